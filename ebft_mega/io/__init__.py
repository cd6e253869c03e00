"""Files in and out of any directory: durable writes, new directories, strict records, progress, input errors."""
