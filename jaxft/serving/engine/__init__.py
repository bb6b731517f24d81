"""The process of an engine, which alone holds a model: it answers the requests that the server hands over."""
