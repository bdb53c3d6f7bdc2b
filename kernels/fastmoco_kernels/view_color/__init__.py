"""The colour half of a view: jitter, greyscale, blur, solarize, normalise, cast and layout, bit for bit as PIL."""
