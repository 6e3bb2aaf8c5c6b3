"""Items as nodes of a graph."""
