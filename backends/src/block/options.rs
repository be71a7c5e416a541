//! What a user says of a disk, and opening it: everything that can be wrong with an image is found before a guest starts.
#![allow(unsafe_code, reason = "OFD locks have no safe wrapper among our dependencies")]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::block::storage::Geometry;
use crate::block::storage::null::Null;
use crate::block::storage::raw::{DirectAlign, Raw};
use crate::host::inherited;
use crate::host::retry::outwait;
use crate::options::{Check, Checked};

/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 64;
/// Most descriptors of a queue.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Length of a serial number that the guest can see (virtio 1.3, section 5.2.6).
pub const SERIAL_LEN: usize = 20;

/// What holds a disk's bytes. Always said, never guessed from contents: a guest could write itself another format.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StorageKind {
    /// A file or block device, byte for byte.
    #[default]
    Raw,
    /// Nothing: requests succeed at once, for measuring.
    Null,
}

crate::options! {
    /// A disk as the command line, a configuration file or a daemon's arguments describe it.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct BlockOptions {
        /// Image file or block device. Raw storage needs it, or `fd`.
        #[key(positional, value("PATH"))]
        pub path: Option<PathBuf>,
        /// Descriptor of the image, opened (and locked, if need be) by whoever started this process.
        pub fd: Option<RawFd>,
        /// What holds the bytes: an image, or nothing at all, for measuring.
        pub storage: StorageKind,
        /// Size of null storage. An image has the size of its file.
        pub size: Option<u64>,
        /// Bypass the page cache (O_DIRECT).
        pub direct: bool,
        /// Refuse writes.
        pub readonly: bool,
        /// Number of queues, 1 to 64.
        pub queues: u16 = 1,
        /// Descriptors per queue, a power of two from 4 to 1024.
        pub queue_size: u16 = 256,
        /// Serial number, at most 20 bytes of printable ASCII.
        pub serial: Option<String>,
        /// Logical block size that the guest sees, 512 to 4096. Without it, what the storage can address.
        #[key(value("BYTES"))]
        pub block_size: Option<u32>,
    }
}

/// Why a disk can't be had.
#[derive(Debug, Error)]
pub enum OpenError {
    /// An option that can't be, alone or with another.
    #[error("disk {disk}: {what}")]
    Option {
        /// The disk, by its path or kind.
        disk: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// The host refused.
    #[error("disk {disk}: {what}: {source}{hint}")]
    Host {
        /// The disk, by its path.
        disk: String,
        /// What was tried.
        what: &'static str,
        /// What came back.
        source: io::Error,
        /// What to do, with its own punctuation in front.
        hint: &'static str,
    },
}

impl Check for BlockOptions {
    fn check(&self) -> Result<(), String> {
        let one = self.path.is_some() || self.fd.is_some();
        match self.storage {
            _ if self.path.as_deref() == Some(Path::new("")) => {
                return Err("path= is empty, name an image file or a block device".into());
            }
            _ if self.path.is_some() && self.fd.is_some() => {
                return Err("path= and fd= exclude each other, leave out one of the two".into());
            }
            _ if self.fd.is_some_and(|fd| fd <= 2) => {
                return Err("fd= 0, 1 and 2 are for input, output and errors; inherit it under a higher number".into());
            }
            StorageKind::Raw if !one => return Err(NO_PATH.into()),
            StorageKind::Raw if self.size.is_some() => {
                return Err("size= is for storage=null, an image has the size of its file".into());
            }
            StorageKind::Null if one => return Err("storage=null takes no path=, leave out one of the two".into()),
            StorageKind::Null if self.size.is_none() => {
                return Err("storage=null needs a size=, e.g. size=10G".into());
            }
            StorageKind::Null if self.direct => return Err("direct=on does not go with storage=null".into()),
            _ => {}
        }
        self.check_queues()?;
        if let Some(size) = self.block_size
            && (!size.is_power_of_two() || !(512..=4096).contains(&size))
        {
            return Err(format!("block-size={size} is not 512, 1024, 2048 or 4096"));
        }
        if let Some(serial) = &self.serial
            && (serial.len() > SERIAL_LEN || !serial.bytes().all(|b| b.is_ascii_graphic() || b == b' '))
        {
            return Err(format!("serial={serial:?} is not at most {SERIAL_LEN} printable ASCII characters"));
        }
        Ok(())
    }
}

impl Checked<BlockOptions> {
    /// Opens and locks the image, or takes the inherited descriptor; `None` for null storage. A process that gets the
    /// file as `fd` shares the lock, so the disk can move to another process without being unlocked in between.
    ///
    /// # Errors
    /// Anything that is wrong with the image.
    pub fn open_image(&self) -> Result<Option<File>, OpenError> {
        if self.storage == StorageKind::Null {
            return Ok(None);
        }
        let host = |what, source: io::Error, hint| OpenError::Host { disk: self.name(), what, source, hint };
        let file = match (&self.path, self.fd) {
            (Some(path), _) => {
                let meta = std::fs::metadata(path).map_err(|e| {
                    let missing = e.kind() == io::ErrorKind::NotFound;
                    let hint = if missing { "; create it first, e.g. with truncate -s 10G" } else { "" };
                    host("opening the image", e, hint)
                })?;
                // Merely opening some devices does something to them.
                self.check_kind(&meta)?;
                self.open_path(path)?
            }
            (None, Some(fd)) => self.inherit(fd)?,
            (None, None) => return Err(self.refuse(NO_PATH)),
        };
        let locked = outwait(&[libc::EAGAIN, libc::EACCES], || lock(&file, self.readonly));
        locked.map_err(|e| match e.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) if !self.readonly && is_read_locked(&file) => {
                host("locking the image for writing", e, READ_LOCKED)
            }
            Some(libc::EAGAIN | libc::EACCES) => {
                host("locking the image", e, "; another process uses it, stop that one or open it readonly=on in both")
            }
            _ => host("locking the image", e, ""),
        })?;
        Ok(Some(file))
    }
}

impl BlockOptions {
    /// Checks number and size of the queues.
    ///
    /// # Errors
    /// As [`Check::check`].
    pub fn check_queues(&self) -> Result<(), String> {
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(format!("queues={} is not from 1 to {MAX_QUEUES}", self.queues));
        }
        if !self.queue_size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(&self.queue_size) {
            return Err(format!("queue-size={} is not a power of two from 4 to {MAX_QUEUE_SIZE}", self.queue_size));
        }
        Ok(())
    }

    fn name(&self) -> String {
        match (&self.path, self.fd) {
            (Some(path), _) => path.display().to_string(),
            (None, Some(fd)) => format!("fd {fd}"),
            (None, None) => "(null storage)".into(),
        }
    }

    pub(super) fn refuse(&self, what: impl Into<String>) -> OpenError {
        OpenError::Option { disk: self.name(), what: what.into() }
    }

    /// Null storage.
    pub(super) fn null(&self) -> Result<Null, OpenError> {
        let logical_block = self.block_size.unwrap_or(512);
        let capacity = self.whole_blocks(self.size.unwrap_or(0), logical_block)?;
        let physical_block = logical_block.max(4096);
        Ok(Null(Geometry { capacity, logical_block, physical_block, readonly: self.readonly, discard: true }))
    }

    /// Opens the image without waiting for anybody, whatever has taken its place since it was looked at.
    fn open_path(&self, path: &Path) -> Result<File, OpenError> {
        let host = |what, source: io::Error, hint| OpenError::Host { disk: self.name(), what, source, hint };
        let direct = if self.direct { libc::O_DIRECT } else { 0 };
        let mut options = OpenOptions::new();
        options.read(true).write(!self.readonly).custom_flags(direct | libc::O_NONBLOCK | libc::O_NOCTTY);
        // EAGAIN: another process has a lease on the file (fcntl(2), F_SETLEASE); the kernel has asked it to give it
        // back.
        let file = outwait(&[libc::EAGAIN], || options.open(path)).map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) if self.direct => host("opening with direct=on", e, NO_DIRECT),
            Some(libc::EACCES | libc::EPERM | libc::EROFS) if !self.readonly => {
                host("opening the image for writing", e, "; check its permissions or use readonly=on")
            }
            _ => host("opening the image", e, ""),
        })?;
        self.check_kind(&file.metadata().map_err(|e| host("looking at the image", e, ""))?)?;
        let flags = fcntl_getfl(&file).map_err(|e| host("asking how it was opened", e.into(), ""))?;
        fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| host("having I/O wait", e.into(), ""))?;
        Ok(file)
    }

    fn check_kind(&self, meta: &std::fs::Metadata) -> Result<(), OpenError> {
        let kind = meta.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let found = if kind.is_dir() { "a directory" } else { "a special file" };
            return Err(self.refuse(format!("it is {found}, name an image file or a block device")));
        }
        Ok(())
    }

    /// Takes an inherited descriptor, and has it in the mode that is asked for.
    fn inherit(&self, fd: RawFd) -> Result<File, OpenError> {
        let host = |what, source: io::Error, hint| OpenError::Host { disk: self.name(), what, source, hint };
        let file = inherited::take(fd).map(File::from).map_err(|e| match e.raw_os_error() {
            Some(libc::EBADF) => host("using the descriptor", e, "; inherit it open"),
            _ => host("using the descriptor", e, ""),
        })?;
        self.check_kind(&file.metadata().map_err(|e| host("looking at the image", e, ""))?)?;
        let flags = fcntl_getfl(&file).map_err(|e| host("asking how it was opened", e.into(), ""))?;
        if flags & OFlags::RWMODE == OFlags::WRONLY || !self.readonly && flags & OFlags::RWMODE != OFlags::RDWR {
            return Err(self.refuse("it is not open for reading and writing; open it so, or use readonly=on"));
        }
        let mut wanted = flags;
        wanted.set(OFlags::DIRECT, self.direct);
        if wanted != flags {
            fcntl_setfl(&file, wanted).map_err(|e| host("setting direct=", e.into(), NO_DIRECT))?;
        }
        Ok(file)
    }

    /// Raw storage in an open image.
    pub(super) fn raw(&self, mut file: File) -> Result<Raw, OpenError> {
        let host = |what, source: io::Error, hint| OpenError::Host { disk: self.name(), what, source, hint };
        let meta = file.metadata().map_err(|e| host("looking at the image", e, ""))?;
        let align = if self.direct { Some(self.direct_align(&file)?) } else { None };
        let logical_block = self.block_size.unwrap_or_else(|| align.map_or(512, |align| align.offset.clamp(512, 4096)));
        let size = file.seek(SeekFrom::End(0)).map_err(|e| host("reading the size", e, ""))?;
        let capacity = self.whole_blocks(size, logical_block.max(align.map_or(1, |align| align.offset)))?;
        let physical_block = (meta.blksize() as u32).clamp(4096, 1 << 16).next_power_of_two().max(logical_block);
        let discard = !self.readonly && can_punch(&file, capacity);
        let geometry = Geometry { capacity, logical_block, physical_block, readonly: self.readonly, discard };
        Ok(Raw::new(Arc::new(file), geometry, align))
    }

    fn whole_blocks(&self, size: u64, block: u32) -> Result<u64, OpenError> {
        if size == 0 {
            return Err(self.refuse("its size is 0, give it one, e.g. with truncate -s 10G"));
        }
        if !size.is_multiple_of(u64::from(block)) {
            let fit = size.next_multiple_of(u64::from(block));
            let what = format!("its size of {size} bytes is not a multiple of the block size {block}; {fit} would be");
            return Err(self.refuse(what));
        }
        Ok(size)
    }

    fn direct_align(&self, file: &File) -> Result<DirectAlign, OpenError> {
        let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        let stat = stat.map_err(|e| OpenError::Host {
            disk: self.name(),
            what: "asking for its O_DIRECT alignment",
            source: e.into(),
            hint: "",
        })?;
        if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
            // Kernels before 6.1 don't say. A page suits every device they know.
            return Ok(DirectAlign { memory: 4096, offset: 4096 });
        }
        if stat.stx_dio_offset_align == 0 || stat.stx_dio_mem_align == 0 {
            return Err(self.refuse(format!("direct=on is not possible{NO_DIRECT}")));
        }
        Ok(DirectAlign { memory: stat.stx_dio_mem_align, offset: stat.stx_dio_offset_align })
    }
}

const NO_PATH: &str = "path= is missing, name an image file";
const READ_LOCKED: &str = "; another process holds a read lock on it: stop that one, and if it should not have been able to, let \
                           only this user read the image (chmod 600)";
const NO_DIRECT: &str = "; its file system has no O_DIRECT, use direct=off or move it";

/// An open-file-description lock over the whole file: exclusive for a writer, shared for readers. It ends with the file.
fn lock(file: &File, readonly: bool) -> io::Result<()> {
    let lock = whole_file(if readonly { libc::F_RDLCK } else { libc::F_WRLCK });
    // SAFETY: the descriptor is open and the structure lives across the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether nothing but readers' locks keep a writer out. Anybody who may open the file for reading can hold one.
fn is_read_locked(file: &File) -> bool {
    let mut lock = whole_file(libc::F_WRLCK);
    // SAFETY: the descriptor is open, and the structure lives across the call, which writes to it.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    asked == 0 && i32::from(lock.l_type) == libc::F_RDLCK
}

fn whole_file(kind: libc::c_int) -> libc::flock {
    // SAFETY: all fields of the structure are plain numbers, for which zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock
}

/// Whether holes can be punched. Tries it where there is no data: past the end of the file.
fn can_punch(file: &File, size: u64) -> bool {
    use rustix::fs::FallocateFlags;
    if file.metadata().is_ok_and(|meta| meta.file_type().is_block_device()) {
        // A device refuses ranges past its end; the first discard shows whether it can discard.
        return true;
    }
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, size, 4096).is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::ffi::OsStrExt;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::fs::{CWD, FileType, RenameFlags};

    use super::*;

    fn image(dir: &Path) -> BlockOptions {
        let path = dir.join("x.img");
        File::create(&path).and_then(|file| file.set_len(1 << 20)).unwrap();
        BlockOptions { path: Some(path), ..BlockOptions::default() }
    }

    fn checked(options: &BlockOptions) -> Checked<BlockOptions> {
        Checked::new(options.clone()).unwrap()
    }

    fn error(options: &BlockOptions) -> String {
        let error = checked(options).open_image().expect_err("it is refused").to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn an_inherited_image_is_owned_and_gone_with_its_owner() {
        let dir = tempfile::tempdir_in(crate::scratch_dir()).unwrap();
        let path = image(dir.path()).path.unwrap();
        // Inherited descriptors are not closed on exec, or they would not have been inherited.
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        let number = inherited::leave(OwnedFd::from(file));
        let options = BlockOptions { fd: Some(number), ..BlockOptions::default() };
        let open = checked(&options).open_image().unwrap().unwrap();
        let leads_here = || {
            let links = std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
            links.filter(|link| link.as_os_str().as_bytes() == path.as_os_str().as_bytes()).count()
        };
        assert_eq!((open.as_raw_fd(), leads_here()), (number, 1), "the number itself, and no copy of it");
        assert!(
            rustix::io::fcntl_getfd(&open).unwrap().contains(rustix::io::FdFlags::CLOEXEC),
            "children do not get it"
        );
        let twice = error(&options);
        assert!(twice.contains(&format!("fd {number}")) && twice.contains("named twice"), "{twice}");
        drop(open);
        assert_eq!(leads_here(), 0);
    }

    #[test]
    fn a_fifo_that_takes_the_images_place_does_not_hang_the_start() {
        let dir = tempfile::tempdir_in(crate::scratch_dir()).unwrap();
        // Opening a FIFO for reading waits for a writer; opening it for both does not.
        let options = BlockOptions { readonly: true, ..image(dir.path()) };
        let (path, fifo) = (options.path.clone().unwrap(), dir.path().join("fifo"));
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, 0o600.into(), 0).unwrap();
        let over = AtomicBool::new(false);
        let (done, told) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    rustix::fs::renameat_with(CWD, &fifo, CWD, &path, RenameFlags::EXCHANGE).unwrap();
                }
            });
            scope.spawn(move || {
                let options = checked(&options);
                let (mut opened, mut refused) = (0, 0);
                for _ in 0..5000 {
                    match options.open_image() {
                        Ok(_) => opened += 1,
                        Err(error) => {
                            assert!(error.to_string().contains("a special file"), "{error}");
                            refused += 1;
                        }
                    }
                }
                done.send((opened, refused)).unwrap();
            });
            let ended = told.recv_timeout(Duration::from_secs(60));
            over.store(true, Ordering::Relaxed);
            if ended.is_err() {
                // Lets the one that hangs go on.
                for path in [dir.path().join("fifo"), dir.path().join("x.img")] {
                    drop(OpenOptions::new().read(true).write(true).open(path));
                }
            }
            println!("{ended:?} (opened, refused)");
            ended.expect("no start hangs");
        });
        let options = image(&std::fs::create_dir(dir.path().join("still")).map(|()| dir.path().join("still")).unwrap());
        let open = checked(&options).open_image().unwrap().unwrap();
        assert!(!fcntl_getfl(&open).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn a_readers_lock_is_told_from_a_writers() {
        let dir = tempfile::tempdir_in(crate::scratch_dir()).unwrap();
        let writer = image(dir.path());
        let reader = BlockOptions { readonly: true, ..writer.clone() };
        let open = checked(&reader).open_image().unwrap();
        let said = error(&writer);
        assert!(said.contains("read lock") && said.contains("chmod 600"), "{said}");
        drop(open);
        let open = checked(&writer).open_image().unwrap();
        for options in [&writer, &reader] {
            let said = error(options);
            assert!(said.contains("another process uses it") && !said.contains("read lock"), "{said}");
        }
        drop(open);
    }
}
