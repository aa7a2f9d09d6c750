"""A dense FFN as experts chosen by token: how it is cut (partition), chosen (router), mended (refit) and stored."""
