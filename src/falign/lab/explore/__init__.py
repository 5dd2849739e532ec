"""A page of this machine alone, to watch runs and to move the parameters of the simulators."""
