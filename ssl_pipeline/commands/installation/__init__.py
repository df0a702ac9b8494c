"""What `check-install` looks at: packages, devices, the host. Each check yields findings and never raises."""
