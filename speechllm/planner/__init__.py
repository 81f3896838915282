"""What a configuration takes: memory of a rank, bytes on the wire, and which strategy fits."""
