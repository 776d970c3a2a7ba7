"""One file and one class per method; the registry beside this package names them."""
