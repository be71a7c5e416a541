//! The disk that is measured: a file full of data that is in the page cache and not dirty, on a real file system.

use std::env;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{Advice, fadvise};
use tempfile::NamedTempFile;

use crate::cli::BlockOptions;
use crate::host::FileSystem;
use crate::rng::Rng;
use crate::signals;
use crate::workload::Storage;

const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;

/// The disk.
#[derive(Debug)]
pub struct Scratch {
    /// Where it is; `None` if nothing holds its bytes.
    pub path: Option<PathBuf>,
    /// How many bytes of it are used.
    pub size: u64,
    /// What it lies on.
    pub file_system: Option<String>,
    /// Removes the file at the end, if it is a temporary one.
    _temporary: Option<NamedTempFile>,
}

/// What disk is wanted.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// The file or block device; a temporary file if not given.
    pub file: Option<&'a Path>,
    /// How many bytes of it are to be used; fewer if it exists and is smaller.
    pub size: u64,
    /// How many it has to have.
    pub least: u64,
    /// Whether it is used past the page cache.
    pub direct: bool,
    /// What changes it, if something does.
    pub writer: Option<String>,
    /// Whether that may happen to a disk that existed before.
    pub overwrite: bool,
}

impl Scratch {
    /// Opens the disk that the options name, or makes one.
    ///
    /// # Errors
    /// A disk that can't be used as asked, or a file system that can't take one.
    pub fn prepare(options: &BlockOptions) -> Result<Self> {
        let largest = options.largest_bs();
        if options.size < largest {
            bail!("--size {} is less than one block of {largest}: give more, or smaller --bs", options.size);
        }
        if options.storage == Storage::Null {
            return Ok(Self { path: None, size: options.size, file_system: None, _temporary: None });
        }
        let writer = options.rw.iter().find(|rw| rw.writes());
        Self::obtain(&Wanted {
            file: options.file.as_deref(),
            size: options.size,
            least: largest,
            direct: options.direct,
            writer: writer.map(|rw| format!("--rw {}", rw.job())),
            overwrite: options.overwrite,
        })
    }

    /// Opens the disk that is wanted, or makes one.
    ///
    /// # Errors
    /// A disk that can't be used as asked, or a file system that can't take one.
    pub fn obtain(wanted: &Wanted<'_>) -> Result<Self> {
        match wanted.file {
            Some(path) if path.exists() => existing(path, wanted),
            Some(path) => {
                let file_system = file_system_of(path.parent().unwrap_or(Path::new(".")))?;
                let mut file = File::create_new(path).with_context(|| format!("making {}", path.display()))?;
                fill(&mut file, wanted.size).with_context(|| format!("filling {}", path.display()))?;
                let (path, file_system) = (Some(path.to_owned()), Some(file_system.name));
                Ok(Self { path, size: wanted.size, file_system, _temporary: None })
            }
            None => temporary(wanted),
        }
    }

    /// Waits until all that was written is on the disk: writing back must not run along with what is measured next.
    ///
    /// # Errors
    /// The disk fails.
    pub fn settle(&self) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let sync = || File::open(path)?.sync_all();
        sync().with_context(|| format!("writing back {}", path.display()))
    }
}

impl Scratch {
    /// Has the page cache hold everything as it is after a time of small writes: dirty, since the first write to a clean page
    /// costs many times what later ones do and those who come first must not pay for all; and in folios of a page each. ext4
    /// walks all blocks of a folio at each write to it: with the large ones that large writes make (Linux 6.16 and later),
    /// random writes of 4 KiB were at a tenth of this, for the plain ring as for everybody.
    ///
    /// # Errors
    /// The disk fails.
    pub fn dirty(&self) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        self.settle()?;
        let name = path.display();
        let mut file = OpenOptions::new().write(true).open(path).with_context(|| format!("opening {name}"))?;
        // Advice: where it is not taken, folios stay as they are.
        let _ = fadvise(&file, 0, None, Advice::DontNeed);
        write_all(&mut file, self.size, PAGE).with_context(|| format!("filling {name}"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.path.iter().for_each(|path| signals::keep_on_signal(path));
    }
}

fn existing(path: &Path, wanted: &Wanted<'_>) -> Result<Scratch> {
    let name = path.display();
    let kind = path.metadata().with_context(|| format!("looking at {name}"))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        bail!("{name} is neither a file nor a block device: give one of those, or a path where a file can be made");
    }
    if let Some(writer) = wanted.writer.as_ref().filter(|_| !wanted.overwrite) {
        bail!("{writer} would overwrite {name}, which exists: add --overwrite if that is meant");
    }
    let mut file = OpenOptions::new().read(true).open(path).with_context(|| format!("opening {name}"))?;
    let len = file.seek(SeekFrom::End(0)).with_context(|| format!("finding the size of {name}"))?;
    let size = len.min(wanted.size);
    let least = wanted.least;
    if size < least {
        bail!("{name} has {len} bytes, fewer than one block of {least}: give a larger one, or smaller blocks");
    }
    let file_system = if kind.is_block_device() { "block device".to_owned() } else { file_system_of(path)?.name };
    if !wanted.direct {
        warm(&mut file, size).with_context(|| format!("reading {name}"))?;
    }
    Ok(Scratch { path: Some(path.to_owned()), size, file_system: Some(file_system), _temporary: None })
}

fn temporary(wanted: &Wanted<'_>) -> Result<Scratch> {
    let mut refused = Vec::new();
    for dir in candidates() {
        let Ok(file_system) = FileSystem::of(&dir) else { continue };
        if file_system.in_memory {
            refused.push(format!("{} ({})", dir.display(), file_system.name));
            continue;
        }
        if file_system.available < wanted.size + (wanted.size >> 3) {
            refused.push(format!("{} ({} MiB free)", dir.display(), file_system.available >> 20));
            continue;
        }
        let Ok(mut file) = tempfile::Builder::new().prefix("ringvm-bench-").suffix(".img").tempfile_in(&dir) else {
            refused.push(format!("{} (not writable)", dir.display()));
            continue;
        };
        signals::remove_on_signal(file.path());
        let path = file.path().to_owned();
        fill(file.as_file_mut(), wanted.size).with_context(|| format!("filling {}", path.display()))?;
        let (path, file_system) = (Some(path), Some(file_system.name));
        return Ok(Scratch { path, size: wanted.size, file_system, _temporary: Some(file) });
    }
    bail!(
        "no place for a scratch disk of {} MiB: {}. Files in memory are no measure of a disk: set TMPDIR to a directory on \
         a real file system, or give --file",
        wanted.size >> 20,
        if refused.is_empty() { "no directory found".to_owned() } else { refused.join(", ") }
    )
}

/// Directories that may take the scratch disk, the best first.
fn candidates() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = env::var_os("TMPDIR").map(PathBuf::from).into_iter().collect();
    dirs.extend(env::current_dir().ok().map(|dir| dir.join("target")).filter(|dir| dir.is_dir()));
    dirs.extend(env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned)));
    dirs.push(env::temp_dir());
    dirs.push(PathBuf::from("/var/tmp"));
    dirs
}

fn file_system_of(path: &Path) -> Result<FileSystem> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let found = FileSystem::of(path).with_context(|| format!("asking for the file system of {}", path.display()))?;
    if found.in_memory {
        bail!(
            "{} is on {}: files in memory are no measure of a disk; give a path on a real file system",
            path.display(),
            found.name
        );
    }
    Ok(found)
}

/// Writes data that no storage can do without, and waits until it is on the disk: writing back must not run along with
/// what is measured.
fn fill(file: &mut File, size: u64) -> Result<()> {
    write_all(file, size, CHUNK)?;
    file.sync_all()?;
    Ok(())
}

fn write_all(file: &mut File, size: u64, piece: usize) -> Result<()> {
    let mut rng = Rng::new(0x5ca7_c4ed);
    let mut chunk = vec![0; CHUNK];
    let mut left = size;
    while left != 0 {
        signals::check()?;
        for word in chunk.as_chunks_mut::<8>().0 {
            *word = rng.next_u64().to_le_bytes();
        }
        let now = left.min(CHUNK as u64);
        for bytes in chunk[..now as usize].chunks(piece) {
            file.write_all(bytes)?;
        }
        left -= now;
    }
    Ok(())
}

/// Reads everything once.
fn warm(file: &mut File, size: u64) -> Result<()> {
    file.seek(SeekFrom::Start(0))?;
    let mut chunk = vec![0; CHUNK];
    let mut left = size;
    while left != 0 {
        let got = file.read(&mut chunk[..left.min(CHUNK as u64) as usize])?;
        if got == 0 {
            bail!("the file ended before its size");
        }
        left -= got as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn options(words: &[&str]) -> BlockOptions {
        let size = if words.contains(&"--size") { &[][..] } else { &["--size", "1M"] };
        let all = ["ringvm-bench", "block"].iter().chain(size).chain(words);
        let Some(Command::Block(options)) = Cli::try_parse_from(all).unwrap().command else { unreachable!() };
        *options
    }

    fn error(words: &[&str]) -> String {
        format!("{:#}", Scratch::prepare(&options(words)).unwrap_err())
    }

    #[test]
    fn a_temporary_disk_has_its_size_and_goes_away() {
        let scratch = Scratch::prepare(&options(&[])).unwrap();
        let path = scratch.path.clone().unwrap();
        scratch.dirty().unwrap();
        scratch.settle().unwrap();
        assert_eq!(path.metadata().unwrap().len(), 1 << 20);
        assert!(!FileSystem::of(&path).unwrap().in_memory);
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn what_exists_is_not_overwritten_unasked() {
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let path = dir.path().join("disk");
        let name = path.to_str().unwrap();
        std::fs::write(&path, [1; 8192]).unwrap();
        assert!(error(&["--file", name, "--rw", "write"]).contains("--overwrite"));
        assert_eq!(Scratch::prepare(&options(&["--file", name, "--rw", "write", "--overwrite"])).unwrap().size, 8192);
        assert_eq!(Scratch::prepare(&options(&["--file", name])).unwrap().size, 8192);
        assert!(error(&["--file", name, "--bs", "64k"]).contains("fewer than one block"));
        assert!(error(&["--file", dir.path().to_str().unwrap()]).contains("neither a file nor a block device"));
    }

    #[test]
    fn null_storage_has_no_file_and_room_for_a_block() {
        assert!(Scratch::prepare(&options(&["--storage", "null"])).unwrap().path.is_none());
        assert!(error(&["--storage", "null", "--size", "64k", "--bs", "4k,128k"]).contains("one block of 131072"));
    }

    #[test]
    fn files_in_memory_are_refused() {
        let shm = Path::new("/dev/shm");
        if FileSystem::of(shm).is_ok_and(|found| found.in_memory) {
            assert!(error(&["--file", "/dev/shm/ringvm-bench-test.img"]).contains("no measure of a disk"));
        } else {
            assert!(!FileSystem::of(Path::new("/proc/self/exe")).unwrap().in_memory);
        }
    }
}
