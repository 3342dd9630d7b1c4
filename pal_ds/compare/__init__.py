"""`pal-ds compare`: every method of a suite over seeds on one dataset, in one table with intervals."""
