"""The dataset format; read and check datasets on a local disk or in a store."""
