"""The endpoints, each module a table of routes and their handlers."""
