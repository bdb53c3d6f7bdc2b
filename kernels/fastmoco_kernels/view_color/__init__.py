"""The colors of a view: jitter, grayscale, blur, solarize, normalise, cast; bit for bit as PIL."""
