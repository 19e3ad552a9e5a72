"""Operations that several attentions share."""
