//! Builds the embedded guest with a nested cargo, so that the library can carry its ELF image.
//!
//! The guest is a crate outside the workspace: it is `no_std`, has a link script of its own and wants none of the
//! flags that the workspace (or a wrapper such as clippy) is being built with. Its target directory lies under
//! `OUT_DIR`, so the nested cargo never waits for a lock that the outer one holds.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// What the outer cargo says to its own compiler, and the guest's must not hear.
const NOT_FOR_THE_GUEST: &[&str] = &[
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "CARGO_MAKEFLAGS",
    "MAKEFLAGS",
    "RUSTC",
    "RUSTDOC",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CLIPPY_ARGS",
    "CLIPPY_CONF_DIR",
    "TARGET",
    "HOST",
    "PROFILE",
    "OPT_LEVEL",
    "DEBUG",
];

fn main() {
    let guest = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("guest");
    let target_dir = PathBuf::from(variable("OUT_DIR")).join("guest");
    for input in ["src", "Cargo.toml", "Cargo.lock", "build.rs", "link.ld", ".cargo/config.toml"] {
        println!("cargo::rerun-if-changed={}", guest.join(input).display());
    }
    // The one file of the guest that lies elsewhere.
    println!("cargo::rerun-if-changed={}", guest.join("../../backends/src/stats/histogram/steps.rs").display());
    let elf = build(&guest, &target_dir);
    println!("cargo::rustc-env=RINGVM_GUEST_ELF={}", elf.display());
}

/// Runs the nested cargo and returns the path of the image.
fn build(guest: &Path, target_dir: &Path) -> PathBuf {
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .args(["build", "--release", "--locked", "--target-dir"])
        .arg(target_dir)
        // The guest's .cargo/config.toml is found from the working directory, not from the manifest.
        .current_dir(guest);
    for name in NOT_FOR_THE_GUEST {
        cargo.env_remove(name);
    }
    // Per-profile overrides from the caller (CARGO_PROFILE_RELEASE_…) would change what is measured.
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PROFILE_") {
            cargo.env_remove(name);
        }
    }
    match cargo.status() {
        Ok(status) if status.success() => target_dir.join("release").join("ringvm-guest"),
        Ok(status) => {
            stop(&format!("building the embedded guest in {} failed: cargo ended with {status}", guest.display()))
        }
        Err(error) => stop(&format!("starting cargo for the embedded guest in {}: {error}", guest.display())),
    }
}

fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| stop(&format!("{name} is not set: build.rs must be run by cargo")))
}

fn stop(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1);
}
