"""SVI on minibatches, in compiled epochs."""
