//! What other VMMs there are on the PATH, and what a program says of its version.

use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{Contestant, Kind};

/// Which program is which.
const PROGRAMS: &[(&str, &[Kind])] = &[
    ("firecracker", &[Kind::Firecracker, Kind::FirecrackerAsync]),
    ("cloud-hypervisor", &[Kind::CloudHypervisor]),
    ("qemu-system-x86_64", &[Kind::Qemu]),
    ("qemu-storage-daemon", &[Kind::StorageDaemon]),
];

/// How long a program may take to say its version.
const PATIENCE: Duration = Duration::from_secs(5);

/// The first program of that name on the PATH.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let is_program =
        |path: &PathBuf| path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0);
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(name)).find(is_program)
}

/// All that can be found.
pub(crate) fn all() -> Vec<Contestant> {
    let contestants = |&(program, kinds): &(&str, &[Kind])| {
        let path = on_path(program)?;
        Some(kinds.iter().map(move |&kind| Contestant::new(kind, path.clone())).collect::<Vec<_>>())
    };
    PROGRAMS.iter().filter_map(contestants).flatten().collect()
}

/// The program of one kind, if it is on the PATH.
pub(crate) fn one(kind: Kind) -> Option<Contestant> {
    // QEMU does without KVM too; whoever wants that says so.
    let same = if kind == Kind::QemuTcg { Kind::Qemu } else { kind };
    let (program, _) = PROGRAMS.iter().find(|(_, kinds)| kinds.contains(&same))?;
    Some(Contestant::new(kind, on_path(program)?))
}

/// For messages: what was looked for.
pub(crate) fn looked_for() -> String {
    PROGRAMS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// The first line of what `--version` prints; `None` if that is nothing, or takes too long.
pub(crate) fn version(path: &Path) -> Option<String> {
    let mut command = Command::new(path);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().ok()?;
    let deadline = Instant::now() + PATIENCE;
    while let Ok(None) = child.try_wait() {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            // What it has started may hold its output open.
            return None;
        }
        thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().next()?.trim();
    (output.status.success() && !line.is_empty()).then(|| line.chars().take(120).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_by_name_and_asked() {
        let shell = on_path("sh").unwrap();
        assert!(shell.is_absolute() && on_path("no-such-program").is_none());
        assert!(version(Path::new("/nowhere/vmm")).is_none());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        std::fs::write(&path, "#!/bin/sh\necho vmm 1.2; echo more\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(version(&path).as_deref(), Some("vmm 1.2"));
    }

    #[test]
    fn every_kind_that_can_be_found_has_a_name_of_its_own() {
        let mut names: Vec<_> = PROGRAMS
            .iter()
            .flat_map(|(_, kinds)| kinds.iter().map(|&kind| Contestant::new(kind, PathBuf::new()).name))
            .collect();
        names.sort();
        let count = names.len();
        names.dedup();
        assert_eq!((names.len(), names.iter().any(String::is_empty)), (count, false));
    }
}
