"""What the project measures about itself. Nothing here ran on hardware; measured numbers are other people's."""
