"""What every room stands on: errors, console, files, strict YAML. No torch."""
