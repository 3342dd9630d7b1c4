# What a batch script has to know of a recipe, without Python, which may be in a container alone. Sourced after common.sh.

# shellcheck shell=bash disable=SC2034
a_text=$'"[^"\n]*"|\'[^\'\n]*\'|[^,}\n]*' # PATTERN of a value that may hold spaces
cache=""                                  # backbone.cache, as far as it is known
stop_signals=""                           # train.stop_signals, likewise

recipe_value() { # FILE KEY PATTERN [SECTION] -> what a recipe, YAML or JSON, says of a key; nothing if it does not name it
  local text before=$'[ \n{,"]'
  local section="$before${4:-}\"?:(.*)" pattern="$before$2\"?:[[:space:]]*($3)"
  text=$'\n'$(sed 's/#.*//' -- "$1")
  # Another section may have a key of that name: those above SECTION are passed over.
  if [ -n "${4:-}" ]; then
    [[ $text =~ $section ]] || return 0
    text=${BASH_REMATCH[1]}
  fi
  [[ $text =~ $pattern ]] && echo "${BASH_REMATCH[1]}" | tr -d "\"'" | sed 's/ *$//'
  return 0
}

look_into() { # RECIPE: what it says of the two; a later recipe wins, as a later word does
  local found
  found=$(recipe_value "$1" cache "$a_text" backbone)
  cache=${found:-$cache}
  found=$(recipe_value "$1" stop_signals '[^]:]*')
  stop_signals=${found:-$stop_signals}
}

refuse_without_usr2() {
  case ${stop_signals:-USR2} in
    *USR2*) ;;
    *) refuse "train.stop_signals is $stop_signals: this script tells the ranks to save by USR2. Add USR2, or leave it out." ;;
  esac
}
