"""Put data, backbone and head together into one model, and refuse parts that do not fit."""
