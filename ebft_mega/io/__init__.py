"""Files in and out of any directory: durable writes, output directories, strict records, progress, errors about inputs."""
