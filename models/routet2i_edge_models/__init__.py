"""The starter models of RouteT2I Edge: data alone, in the folder `starter` of the wheel."""
