//! Where the workspace, its target folder and the tested binaries are.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is a folder of the workspace").to_path_buf()
}

/// Cargo's target folder: the one that holds the running test, marked by cargo with CACHEDIR.TAG.
pub fn target() -> PathBuf {
    env::current_exe()
        .ok()
        .and_then(|exe| exe.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists()).map(Path::to_path_buf))
        .unwrap_or_else(|| workspace().join("target"))
}

/// The lab's folder: the kernel package, what is built from it, and logs.
pub fn lab() -> PathBuf {
    target().join("lab")
}

/// The `ringvm` binary under test: RINGVM_BIN, or the release build, which must be no older than its sources.
pub fn ringvm() -> Result<PathBuf> {
    match env::var_os("RINGVM_BIN") {
        Some(path) => Ok(PathBuf::from(path)),
        None => release_binary("ringvm"),
    }
}

/// A daemon under test: the one that the `ringvm` under test finds beside itself.
pub fn daemon(name: &str) -> Result<PathBuf> {
    match env::var_os("RINGVM_BIN") {
        Some(path) => Ok(Path::new(&path).with_file_name(name)),
        None => release_binary(name),
    }
}

/// A release binary of the workspace, refused when it is absent or older than one of the sources it was built from.
pub fn release_binary(name: &str) -> Result<PathBuf> {
    let path = target().join("release").join(name);
    let built = fs::metadata(&path).and_then(|m| m.modified()).map_err(|e| {
        Error::Missing(format!(
            "the binary under test, {}: {e}; run `cargo build --release --workspace`",
            path.display()
        ))
    })?;
    // Cargo writes the list of sources beside the binary, in make's syntax.
    let list = fs::read_to_string(path.with_extension("d")).unwrap_or_default();
    let sources = list.split_once(": ").map_or("", |(_, sources)| sources);
    let newer = sources
        .split_whitespace()
        .find(|source| fs::metadata(source).and_then(|m| m.modified()).is_ok_and(|changed| changed > built));
    match newer {
        Some(source) => Err(Error::Missing(format!(
            "the binary under test, {}, is older than {source}; run `cargo build --release --workspace`",
            path.display()
        ))),
        None => Ok(path),
    }
}

/// A binary of this package in the same profile as the running test, such as the lab's agent.
pub fn helper(name: &str) -> Result<PathBuf> {
    let exe = env::current_exe().map_err(Error::file("finding", "the running test"))?;
    let folder = exe.parent().map(|dir| if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir });
    let path = folder.unwrap_or(Path::new(".")).join(name);
    if path.exists() {
        Ok(path)
    } else {
        Err(Error::Missing(format!("{} is not built; run the tests with `cargo test`", path.display())))
    }
}
