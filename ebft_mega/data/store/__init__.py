"""The dataset format; read and check datasets on a local disk or an https server."""
