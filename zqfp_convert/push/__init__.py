"""From a checkpoint's folder to a repository on the Hub, with a card that strangers understand."""
