"""What every endpoint shares: errors, access, bodies, lists and uploads as the protocol has them."""
