//! A stock Linux kernel for a guest: its image in both forms, and its modules. It is one that a user names, the one that the
//! host runs, or one in a distribution's package that was unpacked (x86 boot protocol, section "The Real-Mode Kernel Header").

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::{Error, Result};
use super::tools::{decompress, find, run};
use super::tree::Tree;

/// What each kernel says of itself, packed or not.
const BANNER: &[u8] = b"Linux version ";
/// Files of modules are packed as their suffix says.
const PACKED_MODULES: [(&str, &str); 3] = [(".xz", "xz"), (".zst", "zstd"), (".gz", "gzip")];

/// A kernel and its modules.
#[derive(Clone, Debug)]
pub struct Kernel {
    version: String,
    image: PathBuf,
    /// The folder of modules.dep; without one, all that is needed is built in.
    modules: Option<PathBuf>,
}

impl Kernel {
    /// The kernel of a linux-image package that was unpacked into `root`.
    ///
    /// # Errors
    /// There is none, or its modules can't be listed.
    pub fn unpacked(root: &Path) -> Result<Kernel> {
        let boot = root.join("boot");
        let version = fs::read_dir(&boot)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned));
        let Some(version) = version else {
            return Err(Error::Missing(format!("no kernel package unpacked in {}", root.display())));
        };
        let base = if root.join("usr/lib/modules").exists() { root.join("usr") } else { root.to_owned() };
        let modules = base.join("lib/modules").join(&version);
        if modules.exists() && !modules.join("modules.dep").exists() {
            run(Command::new(find("depmod")?).arg("-b").arg(base).arg(&version))?;
        }
        Ok(Kernel { image: boot.join(format!("vmlinuz-{version}")), modules: Some(modules), version })
    }

    /// The kernel that the host runs, if its distribution keeps it where most do.
    ///
    /// # Errors
    /// It is elsewhere, or not for everybody to read.
    pub fn running() -> Result<Kernel> {
        let path = Path::new("/proc/sys/kernel/osrelease");
        let version = fs::read_to_string(path).map_err(Error::file("reading", path))?.trim().to_owned();
        let modules = PathBuf::from("/lib/modules").join(&version);
        let images = [PathBuf::from(format!("/boot/vmlinuz-{version}")), modules.join("vmlinuz")];
        let image = images.iter().find(|path| path.exists()).unwrap_or(&images[0]);
        fs::File::open(image).map_err(Error::file("opening the running kernel,", image))?;
        Ok(Kernel { image: image.clone(), modules: modules.exists().then_some(modules), version })
    }

    /// A bzImage or an ELF image, and the folder of its modules.dep. Without one the folder is looked for where images of its
    /// version have theirs; if there is none, all that a guest needs has to be built in.
    ///
    /// # Errors
    /// It can't be read, is no kernel, or the folder is none of modules.
    pub fn given(image: &Path, modules: Option<&Path>) -> Result<Kernel> {
        let bytes = fs::read(image).map_err(Error::file("reading the kernel", image))?;
        let Some(version) = version(&bytes) else {
            return Err(Error::Missing(format!(
                "{} is neither a bzImage nor an ELF image of Linux for x86-64",
                image.display()
            )));
        };
        let modules = match modules {
            Some(folder) if folder.join("modules.dep").exists() => Some(folder.to_owned()),
            Some(folder) => {
                let name = folder.display();
                return Err(Error::Missing(format!(
                    "{name} has no modules.dep: give the folder of one version, as /lib/modules/{version}, after `depmod`"
                )));
            }
            None => {
                let beside = image.parent().and_then(Path::parent).map(|root| root.join("lib/modules").join(&version));
                let places = beside.into_iter().chain([PathBuf::from("/lib/modules").join(&version)]);
                places.into_iter().find(|folder| folder.join("modules.dep").exists())
            }
        };
        Ok(Kernel { version, image: image.to_owned(), modules })
    }

    /// What `uname -r` says in it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The image as it was found.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// The folder of its modules, if it has one.
    pub fn modules(&self) -> Option<&Path> {
        self.modules.as_deref()
    }

    /// The ELF image: the image itself, or what a bzImage carries, unpacked into `folder`.
    ///
    /// # Errors
    /// It is packed in an unknown way, or can't be unpacked.
    pub fn elf(&self, folder: &Path) -> Result<PathBuf> {
        let image = &self.image;
        let bytes = fs::read(image).map_err(Error::file("reading", image))?;
        if bytes.starts_with(b"\x7fELF") {
            return Ok(image.clone());
        }
        let packed = payload(&bytes).ok_or_else(|| Error::Missing(format!("{}: not a bzImage", image.display())))?;
        let (tool, packed) = match packed {
            [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", without_length(packed)),
            [0x1f, 0x8b, ..] => ("gzip", packed),
            [0xfd, b'7', b'z', b'X', ..] => ("xz", without_length(packed)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", without_length(packed)),
            _ => return Err(Error::Missing(format!("{}: packed in an unknown way", image.display()))),
        };
        let (from, to) = (folder.join("vmlinux.packed"), folder.join("vmlinux"));
        fs::write(&from, packed).map_err(Error::file("writing", &from))?;
        decompress(tool, &from, &to)?;
        fs::remove_file(&from).map_err(Error::file("removing", &from))?;
        Ok(to)
    }

    /// Puts the modules of these names and all that they depend on into the tree, with /modules/order for insmod.
    /// What is built into the kernel needs no module.
    ///
    /// # Errors
    /// A name that the kernel does not know at all, or a file that can't be read or unpacked.
    pub fn add_modules(&self, tree: &mut Tree, names: &[&str], scratch: &Path) -> Result<()> {
        let mut list = String::new();
        for path in self.resolve(names)? {
            let name = module_name(&path);
            let from = self.modules.iter().map(|folder| folder.join(&path)).next().unwrap_or_default();
            let tool = PACKED_MODULES.iter().find(|(suffix, _)| path.ends_with(suffix));
            let plain = match tool {
                Some((_, tool)) => {
                    let to = scratch.join(format!("{name}.ko"));
                    decompress(tool, &from, &to)?;
                    to
                }
                None => from,
            };
            tree.copy(&format!("modules/{name}.ko"), &plain, 0o644);
            list.push_str(&format!("/modules/{name}.ko\n"));
        }
        tree.text("modules/order", &list, 0o644);
        Ok(())
    }

    /// Puts the modules of these names into a folder of the tree, as files for [`Kernel::given`] on another machine.
    ///
    /// # Errors
    /// A name that the kernel does not know at all.
    pub fn copy_modules(&self, tree: &mut Tree, names: &[&str], to: &str) -> Result<()> {
        let lists = ["modules.dep", "modules.builtin"].map(str::to_owned);
        for path in lists.into_iter().chain(self.resolve(names)?) {
            if let Some(folder) = &self.modules {
                tree.copy(&format!("{to}/{path}"), &folder.join(&path), 0o644);
            }
        }
        Ok(())
    }

    /// The files of these modules in the order in which they are to be loaded.
    fn resolve(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        let Some(folder) = &self.modules else { return Ok(order) };
        let list = folder.join("modules.dep");
        let modules = Modules::parse(&fs::read_to_string(&list).map_err(Error::file("reading", &list))?);
        let builtin = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
        let builtin: BTreeSet<_> = builtin.lines().map(module_name).collect();
        for name in names.iter().filter(|name| !builtin.contains(**name)) {
            modules.resolve(name, &mut order)?;
        }
        Ok(order)
    }
}

/// modules.dep: each module's file and the files it needs.
struct Modules(BTreeMap<String, (String, Vec<String>)>);

impl Modules {
    fn parse(list: &str) -> Modules {
        let lines = list.lines().filter_map(|line| line.split_once(':'));
        Modules(
            lines
                .map(|(file, needs)| {
                    (module_name(file), (file.to_owned(), needs.split_whitespace().map(str::to_owned).collect()))
                })
                .collect(),
        )
    }

    /// Appends the files of `name`, what it needs first. modules.dep lists what is needed directly and indirectly, the
    /// outermost first.
    fn resolve(&self, name: &str, order: &mut Vec<String>) -> Result<()> {
        let (file, needs) =
            self.0.get(name).ok_or_else(|| Error::Missing(format!("the kernel has no module {name}")))?;
        for path in needs.iter().rev().chain([file]) {
            if !order.contains(path) {
                order.push(path.clone());
            }
        }
        Ok(())
    }
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

/// The version that an image tells: a bzImage by the boot protocol's kernel_version, an ELF image by its banner.
fn version(image: &[u8]) -> Option<String> {
    let text = if image.get(0x202..0x206) == Some(b"HdrS") {
        let at = usize::from(u16::from_le_bytes([*image.get(0x20e)?, *image.get(0x20f)?]));
        image.get(at + 0x200..)?
    } else if image.starts_with(b"\x7fELF\x02\x01") {
        let at = image.windows(BANNER.len()).position(|window| window == BANNER)?;
        &image[at + BANNER.len()..]
    } else {
        return None;
    };
    let end = text.iter().take(128).position(|byte| !byte.is_ascii_graphic())?;
    let version = String::from_utf8_lossy(&text[..end]).into_owned();
    version.starts_with(|first: char| first.is_ascii_digit()).then_some(version)
}

/// The packed kernel within a bzImage, by the boot protocol's payload_offset and payload_length.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| image.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
    (image.get(0x202..0x206)? == b"HdrS").then_some(())?;
    let setup = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup + 1) * 512 + word(0x248)?;
    image.get(start..start.checked_add(word(0x24c)?)?)
}

/// The kernel's build appends the unpacked length to all formats but gzip, which has it.
fn without_length(packed: &[u8]) -> &[u8] {
    &packed[..packed.len().saturating_sub(4)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_comes_first_and_once() {
        let modules = Modules::parse(
            "kernel/v/virtio_blk.ko: kernel/v/virtio.ko kernel/v/virtio_ring.ko\n\
             kernel/v/virtio.ko: kernel/v/virtio_ring.ko\nkernel/v/virtio_ring.ko:\nkernel/a/kvm-amd.ko.xz:\n",
        );
        let mut order = Vec::new();
        modules.resolve("virtio", &mut order).unwrap();
        modules.resolve("virtio_blk", &mut order).unwrap();
        modules.resolve("kvm_amd", &mut order).unwrap();
        let names: Vec<_> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(names, ["virtio_ring", "virtio", "virtio_blk", "kvm_amd"]);
        assert!(modules.resolve("nothing", &mut order).is_err());
    }

    #[test]
    fn an_image_tells_its_version_or_is_refused() {
        let mut bzimage = vec![0; 0x400];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        bzimage[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        bzimage[0x300..0x30f].copy_from_slice(b"6.1.0-7-x (who)");
        assert_eq!(version(&bzimage).as_deref(), Some("6.1.0-7-x"));
        bzimage[0x20e..0x210].copy_from_slice(&0xffff_u16.to_le_bytes());
        assert_eq!(version(&bzimage), None);
        let elf = b"\x7fELF\x02\x01 and then Linux version 6.12.3 (who) #1";
        assert_eq!(version(elf).as_deref(), Some("6.12.3"));
        assert_eq!(version(b"\x7fELF\x02\x01"), None);
        assert_eq!(version(b""), None);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, "#!/bin/sh").unwrap();
        let error = Kernel::given(&path, None).unwrap_err().to_string();
        assert!(error.contains("neither a bzImage nor an ELF image"), "{error}");
        fs::write(&path, elf).unwrap();
        assert!(Kernel::given(&path, None).unwrap().modules().is_none());
        let error = Kernel::given(&path, Some(dir.path())).unwrap_err().to_string();
        assert!(error.contains("no modules.dep") && error.contains("6.12.3"), "{error}");
        let error = Kernel::given(&dir.path().join("none"), None).unwrap_err().to_string();
        assert!(error.contains("reading the kernel"), "{error}");
    }

    #[test]
    fn a_kernel_without_modules_has_all_built_in() {
        let kernel = Kernel { version: "6.1".to_owned(), image: PathBuf::from("/k"), modules: None };
        assert!(kernel.resolve(&["virtio_blk"]).unwrap().is_empty());
    }
}
