"""The built-in street world: procedural streets, ray cast into images and LiDAR sweeps."""
