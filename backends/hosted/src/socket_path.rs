//! The check of a path that a user names for a Unix socket (`socket=`).

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Longest path of a Unix socket: `sun_path` less the zero at its end.
const MAX_PATH: usize = 107;

/// Whether a socket can have this path, also with as many bytes more behind it.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check(path: &Path, more: usize) -> Result<(), String> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err("socket= is empty, give a path like /run/vm.sock".into());
    }
    if bytes.contains(&0) {
        return Err("socket= has a zero byte in it".into());
    }
    let (len, most) = (bytes.len(), MAX_PATH - more);
    if len > most {
        return Err(format!("socket= has {len} bytes, of which a path here has at most {most}; give a shorter one"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_paths_are_refused() {
        let refused = |path: &str| check(Path::new(path), 0).unwrap_err();
        assert!(refused("").contains("socket= is empty"));
        assert!(refused("a\0b").contains("zero"));
        assert!(refused(&"x".repeat(108)).contains("108 bytes"));
        check(Path::new(&"x".repeat(107)), 0).unwrap();
        assert!(check(Path::new(&"x".repeat(97)), 11).unwrap_err().contains("97 bytes"));
        check(Path::new(&"x".repeat(96)), 11).unwrap();
    }
}
