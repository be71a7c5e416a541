//! The stock Debian kernel of the lab: the package that `tests/run` unpacked, its image in both forms, its modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::tree::{Tree, run};
use crate::{Error, Result, host, paths};

/// An unpacked linux-image package.
#[derive(Clone, Debug)]
pub struct KernelPackage {
    version: String,
    root: PathBuf,
}

impl KernelPackage {
    /// The package that was unpacked into target/lab/kernel.
    pub fn find() -> Result<KernelPackage> {
        let root = paths::lab().join("kernel");
        let boot = root.join("boot");
        let version = fs::read_dir(&boot)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned));
        match version {
            Some(version) => Ok(KernelPackage { version, root }),
            None => {
                Err(Error::Missing(format!("no kernel package unpacked in {}; tests/run does that", root.display())))
            }
        }
    }

    /// The bzImage.
    pub fn bzimage(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.version))
    }

    /// The ELF image that the bzImage carries, unpacked into `folder`.
    pub fn unpack_vmlinux(&self, folder: &Path) -> Result<PathBuf> {
        let image = self.bzimage();
        let bytes = fs::read(&image).map_err(Error::file("reading", &image))?;
        let packed = payload(&bytes).ok_or_else(|| Error::Missing(format!("{}: not a bzImage", image.display())))?;
        let (tool, packed) = match packed {
            [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", without_length(packed)),
            [0x1f, 0x8b, ..] => ("gzip", packed),
            [0xfd, b'7', b'z', b'X', ..] => ("xz", without_length(packed)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", without_length(packed)),
            _ => return Err(Error::Missing(format!("{}: packed in a way the lab does not know", image.display()))),
        };
        let (from, to) = (folder.join("vmlinux.packed"), folder.join("vmlinux"));
        fs::write(&from, packed).map_err(Error::file("writing", &from))?;
        decompress(tool, &from, &to)?;
        fs::remove_file(&from).map_err(Error::file("removing", &from))?;
        Ok(to)
    }

    /// Puts the modules of these names and all that they depend on into the tree, with /modules/order for insmod.
    /// What is built into the kernel needs no module; a name the kernel does not know at all is an error.
    pub fn add_modules(&self, tree: &mut Tree, names: &[&str], scratch: &Path) -> Result<()> {
        let modules = self.modules()?;
        let builtin = fs::read_to_string(self.module_folder().join("modules.builtin")).unwrap_or_default();
        let builtin: BTreeSet<_> = builtin.lines().map(module_name).collect();
        let mut order = Vec::new();
        for name in names {
            if !builtin.contains(*name) {
                modules.resolve(name, &mut order)?;
            }
        }
        let mut list = String::new();
        for path in &order {
            let name = module_name(path);
            let from = self.module_folder().join(path);
            let plain = if path.ends_with(".xz") {
                let to = scratch.join(format!("{name}.ko"));
                decompress("xz", &from, &to)?;
                to
            } else {
                from
            };
            tree.copy(&format!("modules/{name}.ko"), &plain, 0o644);
            list.push_str(&format!("/modules/{name}.ko\n"));
        }
        tree.text("modules/order", &list, 0o644);
        Ok(())
    }

    fn module_folder(&self) -> PathBuf {
        let merged = self.root.join("usr/lib/modules");
        let modules = if merged.exists() { merged } else { self.root.join("lib/modules") };
        modules.join(&self.version)
    }

    fn modules(&self) -> Result<Modules> {
        let list = self.module_folder().join("modules.dep");
        if !list.exists() {
            let base = if self.root.join("lib").exists() { self.root.clone() } else { self.root.join("usr") };
            let depmod = host::program("depmod").unwrap_or_else(|| PathBuf::from("depmod"));
            run(Command::new(depmod).arg("-b").arg(base).arg(&self.version))?;
        }
        Ok(Modules::parse(&fs::read_to_string(&list).map_err(Error::file("reading", &list))?))
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
            self.0.get(name).ok_or_else(|| Error::Missing(format!("the kernel package has no module {name}")))?;
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

fn decompress(tool: &str, from: &Path, to: &Path) -> Result<()> {
    let input = fs::File::open(from).map_err(Error::file("opening", from))?;
    let output = fs::File::create(to).map_err(Error::file("creating", to))?;
    run(Command::new(tool).arg("-dc").stdin(input).stdout(Stdio::from(output))).map(drop)
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
}
