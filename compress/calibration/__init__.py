"""What passes learn from calibration text with: batches, sums for least squares, a loss, a block's stages."""
