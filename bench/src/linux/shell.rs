//! Words for a POSIX shell.

/// A word, quoted.
pub(super) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
