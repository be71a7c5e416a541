//! Programs of the host that a guest is made of, or made with.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::{Error, Result};

/// The path of a program, looked up in PATH and where Debian keeps the administrator's programs.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}

/// The same, where it must be there.
///
/// # Errors
/// It is not.
pub fn find(name: &str) -> Result<PathBuf> {
    program(name).ok_or_else(|| Error::Missing(format!("`{name}` is not installed: install the package that has it")))
}

/// Runs a tool of the host and gives its stdout.
///
/// # Errors
/// It can't be started, or fails.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let text = format!("{command:?}");
    let output = command.output().map_err(|e| Error::Tool { command: text.clone(), why: e.to_string() })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let why = format!("{}: {}", output.status, tail(&output.stderr, 400).trim());
    Err(Error::Tool { command: text, why })
}

/// Unpacks a file with this tool, which takes `-dc` as gzip does.
pub(super) fn decompress(tool: &str, from: &Path, to: &Path) -> Result<()> {
    let input = fs::File::open(from).map_err(Error::file("opening", from))?;
    let output = fs::File::create(to).map_err(Error::file("creating", to))?;
    run(Command::new(find(tool)?).arg("-dc").stdin(input).stdout(Stdio::from(output))).map(drop)
}

/// The last `limit` bytes of `text`, cut at a line where there is one.
pub fn tail(text: &[u8], limit: usize) -> String {
    let start = text.len().saturating_sub(limit);
    let cut = &text[start..];
    let cut = match cut.iter().position(|&b| b == b'\n') {
        Some(line) if start > 0 => &cut[line + 1..],
        _ => cut,
    };
    String::from_utf8_lossy(cut).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_found_outside_path_too() {
        assert!(program("sh").is_some());
        let error = find("no-such-program-of-anyone").unwrap_err().to_string();
        assert!(error.contains("`no-such-program-of-anyone` is not installed"), "{error}");
    }

    #[test]
    fn a_tool_that_fails_is_quoted() {
        let error = run(Command::new("sh").args(["-c", "echo oh no >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("oh no") && error.contains('3'), "{error}");
    }

    #[test]
    fn a_tail_begins_with_a_line() {
        assert_eq!(tail(b"first\nsecond\nthird", 12), "third");
        assert_eq!(tail(b"short", 12), "short");
    }
}
