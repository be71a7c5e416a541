//! A file tree in the making, for an initramfs (the kernel's newc cpio) or the root of a disk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::elf::interpreter;
use super::error::{Error, Result};
use super::tools::{find, run};

/// A tree of files. Paths are relative to its root; parents come by themselves.
#[derive(Clone, Debug, Default)]
pub struct Tree(BTreeMap<PathBuf, Node>);

#[derive(Clone, Debug)]
enum Node {
    Folder,
    /// Bytes and permissions.
    Text(Vec<u8>, u32),
    /// A file of the host and permissions.
    Copy(PathBuf, u32),
    Link(PathBuf),
    /// A character device, major and minor: only a cpio holds it.
    Device(u32, u32),
}

impl Tree {
    fn put(&mut self, path: &str, node: Node) {
        let path = PathBuf::from(path.trim_start_matches('/'));
        for parent in path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()) {
            self.0.entry(parent.to_path_buf()).or_insert(Node::Folder);
        }
        self.0.insert(path, node);
    }

    /// An empty folder.
    pub fn folder(&mut self, path: &str) {
        self.put(path, Node::Folder);
    }

    /// A file with this text.
    pub fn text(&mut self, path: &str, text: &str, mode: u32) {
        self.put(path, Node::Text(text.as_bytes().to_vec(), mode));
    }

    /// A copy of a file of the host.
    pub fn copy(&mut self, path: &str, from: &Path, mode: u32) {
        self.put(path, Node::Copy(from.to_path_buf(), mode));
    }

    /// The character device that the kernel opens as the console of init.
    pub fn console(&mut self) {
        self.put("dev/console", Node::Device(5, 1));
    }

    /// A folder of the host with all its files.
    ///
    /// # Errors
    /// It can't be read.
    pub fn copy_folder(&mut self, path: &str, from: &Path) -> Result<()> {
        for entry in fs::read_dir(from).map_err(Error::file("reading", from))? {
            let entry = entry.map_err(Error::file("reading", from))?;
            let to = format!("{path}/{}", entry.file_name().to_string_lossy());
            let metadata = fs::metadata(entry.path()).map_err(Error::file("reading", entry.path()))?;
            if metadata.is_dir() {
                self.copy_folder(&to, &entry.path())?;
            } else {
                self.copy(&to, &entry.path(), 0o644);
            }
        }
        Ok(())
    }

    /// Busybox with a link for each of its applets.
    ///
    /// # Errors
    /// There is none, or it is not static.
    pub fn busybox(&mut self) -> Result<()> {
        let busybox = find("busybox")?;
        if !libraries(&busybox)?.is_empty() {
            return Err(Error::Missing(format!("{} is not static: install busybox-static", busybox.display())));
        }
        let list = run(Command::new(&busybox).arg("--list"))?;
        for applet in String::from_utf8_lossy(&list).lines() {
            self.put(&format!("bin/{applet}"), Node::Link(PathBuf::from("/bin/busybox")));
        }
        self.copy("bin/busybox", &busybox, 0o755);
        Ok(())
    }

    /// A program of the host, by name, with its libraries. It takes the place of a busybox applet of that name.
    ///
    /// # Errors
    /// It, or a library of it, is not installed.
    pub fn tool(&mut self, name: &str) -> Result<()> {
        self.binary(&format!("bin/{name}"), &find(name)?)
    }

    /// A binary of the host with the libraries that the dynamic linker names, each where it looks for it.
    ///
    /// # Errors
    /// It can't be read, or a library of it is not installed.
    pub fn binary(&mut self, path: &str, from: &Path) -> Result<()> {
        for library in libraries(from)? {
            self.copy(&library.to_string_lossy(), &library, 0o755);
        }
        self.copy(path, from, 0o755);
        Ok(())
    }

    /// Writes the tree as a cpio archive (newc), which several of may follow each other in one initramfs.
    ///
    /// # Errors
    /// A file can't be read, or the archive not written.
    pub fn write_cpio(&self, to: &Path) -> Result<()> {
        let file = File::create(to).map_err(Error::file("creating", to))?;
        let mut archive = BufWriter::with_capacity(1 << 20, file);
        self.cpio(&mut archive).and_then(|()| archive.flush()).map_err(Error::file("writing", to))
    }

    fn cpio(&self, archive: &mut impl Write) -> io::Result<()> {
        for (number, (path, node)) in self.0.iter().enumerate() {
            let (mode, bytes, device) = match node {
                Node::Folder => (0o040755, Vec::new(), (0, 0)),
                Node::Text(text, mode) => (0o100000 | mode, text.clone(), (0, 0)),
                Node::Copy(from, mode) => (0o100000 | mode, fs::read(from)?, (0, 0)),
                Node::Link(to) => (0o120777, to.as_os_str().as_encoded_bytes().to_vec(), (0, 0)),
                Node::Device(major, minor) => (0o020600, Vec::new(), (*major, *minor)),
            };
            entry(archive, number + 1, path, mode, &bytes, device)?;
        }
        entry(archive, 0, Path::new("TRAILER!!!"), 0, &[], (0, 0))
    }

    /// Lays the tree down in an empty folder of the host; devices are left out.
    ///
    /// # Errors
    /// A file can't be read or written.
    pub fn write_folder(&self, root: &Path) -> Result<()> {
        for (path, node) in &self.0 {
            let to = root.join(path);
            let (done, mode) = match node {
                Node::Folder => (fs::create_dir_all(&to), None),
                Node::Text(text, mode) => (fs::write(&to, text), Some(*mode)),
                Node::Copy(from, mode) => (fs::copy(from, &to).map(drop), Some(*mode)),
                Node::Link(target) => (symlink(target, &to), None),
                Node::Device(..) => (Ok(()), None),
            };
            done.and_then(|()| mode.map_or(Ok(()), |mode| fs::set_permissions(&to, fs::Permissions::from_mode(mode))))
                .map_err(Error::file("writing", to))?;
        }
        Ok(())
    }
}

fn entry(
    to: &mut impl Write,
    inode: usize,
    path: &Path,
    mode: u32,
    bytes: &[u8],
    device: (u32, u32),
) -> io::Result<()> {
    let name = path.as_os_str().as_encoded_bytes();
    let padding = |length: usize| &[0u8; 3][..(4 - length % 4) % 4];
    // magic, inode, mode, uid, gid, links, mtime, size, device (2), rdevice (2), length of the name with its zero, checksum
    write!(
        to,
        "070701{inode:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
        0,
        0,
        1,
        0,
        bytes.len(),
        0,
        0,
        device.0,
        device.1,
        name.len() + 1,
        0
    )?;
    to.write_all(name)?;
    to.write_all(&[0])?;
    to.write_all(padding(110 + name.len() + 1))?;
    to.write_all(bytes)?;
    to.write_all(padding(bytes.len()))
}

/// The libraries of a binary and its interpreter; none when it is static. The interpreter itself lists them, as ldd(1) has it do.
fn libraries(binary: &Path) -> Result<Vec<PathBuf>> {
    let Some(interpreter) = interpreter(binary)? else { return Ok(Vec::new()) };
    let listed = run(Command::new(&interpreter).arg("--list").arg(binary))?;
    let text = String::from_utf8_lossy(&listed);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        return Err(Error::Missing(format!("{}: {}", binary.display(), line.trim())));
    }
    let listed = text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(listed.chain([interpreter]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpio_is_what_cpio_reads() {
        let folder = tempfile::tempdir().unwrap();
        let mut tree = Tree::default();
        tree.text("etc/motd", "hello\n", 0o644);
        tree.text("/bin/odd", "12345", 0o755);
        tree.folder("proc");
        let archive = folder.path().join("a.cpio");
        tree.write_cpio(&archive).unwrap();
        let bytes = fs::read(&archive).unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let busybox = find("busybox").unwrap();
        let output = Command::new(busybox)
            .args(["cpio", "-i", "-d", "-F"])
            .arg(&archive)
            .current_dir(folder.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(fs::read_to_string(folder.path().join("etc/motd")).unwrap(), "hello\n");
        assert_eq!(fs::read_to_string(folder.path().join("bin/odd")).unwrap(), "12345");
        assert!(folder.path().join("proc").is_dir());
    }

    #[test]
    fn a_program_brings_its_libraries_and_who_loads_them() {
        let all = libraries(&std::env::current_exe().unwrap()).unwrap();
        let names: Vec<_> = all.iter().filter_map(|path| path.file_name()?.to_str()).collect();
        assert!(names.iter().any(|name| name.starts_with("libc.")), "{names:?}");
        assert!(names.iter().any(|name| name.starts_with("ld-")), "{names:?}");
        assert!(libraries(Path::new("/nowhere/program")).unwrap_err().to_string().contains("/nowhere/program"));
    }
}
