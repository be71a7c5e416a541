//! What a Linux guest boots into: busybox, the modules of its devices, and an init.

use std::path::Path;

use super::error::Result;
use super::kernel::Kernel;
use super::tree::Tree;

/// A tree with a static busybox, the console, these modules with all that they need, and this init, which loads them in the
/// order of /modules/order. Tools are for the caller to add.
///
/// # Errors
/// There is no static busybox, or the kernel has no such module.
pub fn base(kernel: &Kernel, modules: &[&str], init: &str, scratch: &Path) -> Result<Tree> {
    let mut tree = Tree::default();
    tree.busybox()?;
    tree.console();
    for folder in ["dev", "proc", "sys", "run", "tmp", "mnt", "etc"] {
        tree.folder(folder);
    }
    tree.text("init", init, 0o755);
    tree.text("etc/passwd", "root:x:0:0:root:/:/bin/sh\n", 0o644);
    kernel.add_modules(&mut tree, modules, scratch)?;
    Ok(tree)
}
