"""The only package that knows a process group or a mesh."""
