"""What the features are worth: `embed` turns images into features, `knn` scores them."""
