"""What reports share: one style, figures without a display, pictures as data addresses, a page in one file."""
