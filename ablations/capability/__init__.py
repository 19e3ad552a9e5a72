"""What an attention is able to do: small synthetic tasks, and one network that is trained on them."""
