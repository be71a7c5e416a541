//! Bad input on the command line and in the configuration file: one clear line on stderr with what, where and what to do,
//! the right exit code, nothing half-started. None of this needs KVM: it is refused before.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ringvm_tests::native::{Ended, program, ringvm};
use tempfile::TempDir;

/// The configuration can't work.
const CONFIGURATION: i32 = 2;
/// A refusal is immediate; the rest is a busy machine.
const SOON: Duration = Duration::from_secs(10);

/// A folder with files to be refused, and a kernel that boots.
struct Files {
    folder: TempDir,
    kernel: String,
}

impl Files {
    fn new() -> Files {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let kernel = ringvm_bench::guest::write_to(folder.path()).expect("the embedded guest");
        Files { kernel: text(&kernel), folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn bytes(&self, name: &str, bytes: &[u8]) -> String {
        fs::write(self.path(name), bytes).expect("a file");
        text(&self.path(name))
    }

    fn sparse(&self, name: &str, size: u64) -> String {
        File::create(self.path(name)).and_then(|file| file.set_len(size)).expect("a sparse file");
        text(&self.path(name))
    }

    /// `ringvm run` with the good kernel and these arguments.
    fn run(&self, arguments: &[&str]) -> Ended {
        run([&["--kernel", self.kernel.as_str()], arguments].concat())
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("a path of ASCII").to_owned()
}

fn run(arguments: Vec<&str>) -> Ended {
    let begun = Instant::now();
    let ended = ringvm(["run"].into_iter().chain(arguments)).and_then(|vm| vm.run()).unwrap_or_else(|e| panic!("{e}"));
    assert!(begun.elapsed() < SOON, "it took {:?}", begun.elapsed());
    ended
}

#[track_caller]
fn refused(ended: &Ended, code: i32, words: &[&str]) {
    ended.assert_refused(code, words);
}

#[test]
fn a_kernel_that_is_missing_unreadable_or_no_kernel() {
    let files = Files::new();
    refused(&run(vec![]), CONFIGURATION, &["--kernel"]);
    let absent = text(&files.path("absent"));
    refused(&run(vec!["--kernel", &absent]), CONFIGURATION, &[&absent, "No such file"]);
    let folder = text(files.folder.path());
    refused(&run(vec!["--kernel", &folder]), CONFIGURATION, &[&folder, "irectory"]);
    for (name, bytes) in [
        ("empty", Vec::new()),
        ("text", b"#!/bin/sh\necho hello\n".repeat(1000)),
        ("zeroes", vec![0; 1 << 20]),
        ("elf-header-alone", fs::read(&files.kernel).expect("the guest")[..64].to_vec()),
        ("elf-cut", fs::read(&files.kernel).expect("the guest")[..2000].to_vec()),
    ] {
        let path = files.bytes(name, &bytes);
        refused(&run(vec!["--kernel", &path, "--serial", "null"]), CONFIGURATION, &[&path]);
    }
}

#[test]
fn an_elf_without_a_pvh_entry() {
    let files = Files::new();
    let program = text(&std::env::current_exe().expect("this test"));
    let ended = run(vec!["--kernel", &program, "--boot", "pvh", "--serial", "null"]);
    refused(&ended, CONFIGURATION, &[&program, "PVH"]);
    drop(files);
}

#[test]
fn an_initramfs_that_is_missing_or_too_large() {
    let files = Files::new();
    let absent = text(&files.path("absent"));
    refused(&files.run(&["--initramfs", &absent]), CONFIGURATION, &[&absent, "No such file"]);
    let large = files.sparse("large", 1 << 30);
    refused(&files.run(&["--memory", "128M", "--initramfs", &large]), CONFIGURATION, &[&large, "--memory"]);
}

#[test]
fn memory_of_nothing_or_beyond_the_host() {
    let files = Files::new();
    for nothing in ["0", "0M", "size=0"] {
        refused(&files.run(&["--memory", nothing]), CONFIGURATION, &["memory"]);
    }
    for beyond in ["64T", "16777215T", "99999999999999T"] {
        let ended = files.run(&["--memory", beyond]);
        assert!([2, 3].contains(&ended.code()), "{} {}", ended.code(), ended.stderr);
        refused(&ended, ended.code(), &["memory"]);
    }
    refused(&files.run(&["--memory", "1000"]), CONFIGURATION, &["memory"]);
    refused(&files.run(&["--memory", "lots"]), CONFIGURATION, &["--memory", "lots", "512M"]);
    refused(&files.run(&["--memory", "size=64M,hugepages=3M"]), CONFIGURATION, &["hugepages"]);
    refused(&files.run(&["--memory", "size=64M,ksm=on,hugepages=2M"]), CONFIGURATION, &["ksm", "hugepages"]);
}

#[test]
fn options_that_are_unknown_or_contradict_each_other() {
    let files = Files::new();
    let image = files.sparse("x.img", 1 << 20);
    for (arguments, words) in [
        (&["--nonsense"][..], &["--nonsense"][..]),
        (&["--cpus", "0"], &["cpu"]),
        (&["--cpus", "many"], &["--cpus", "many"]),
        (&["--cpus", "100000"], &["cpu", "100000"]),
        (&["--cpus", "1,nested=perhaps"], &["--cpus 1,nested=perhaps", "`perhaps`"]),
        (&["--cpus"], &["--cpus"]),
        (&["--serial", "com1"], &["--serial", "com1", "stdio"]),
        (&["--boot", "bios"], &["--boot", "bios"]),
        (&["--disk", ""], &["--disk"]),
        (&["--disk", "path="], &["--disk"]),
        (&["--disk", &format!("path={image},quues=2")], &["quues"]),
        (&["--disk", &format!("path={image},queues=0")], &["queues"]),
        (&["--disk", &format!("path={image},queues=99999")], &["queues"]),
        (&["--disk", &format!("path={image},queue-size=100")], &["queue-size", "power of two"]),
        (&["--disk", &format!("path={image},queue-size=65536")], &["queue-size"]),
        (&["--disk", &format!("path={image},direct=perhaps")], &["direct", "perhaps"]),
        (&["--disk", &format!("path={image},serial=a-serial-number-of-more-than-20")], &["serial", "20"]),
        (&["--disk", &format!("path={image},path={image}")], &["path"]),
        (&["--disk", &format!("path={image},block-size=1000")], &["block-size"]),
        (&["--disk", &image, "--disk", &image], &["twice"]),
        (&["--disk", &format!("path={image},id=0")], &["id: \"0\"", "the first is a letter"]),
        (&["--rng", "on", "--disk", &format!("path={image},id=rng0")], &["rng0 is the name of two devices", "id="]),
    ] {
        refused(&files.run(arguments), CONFIGURATION, words);
    }
    let twice = run(vec!["--kernel", &files.kernel, "--kernel", &files.kernel]);
    refused(&twice, CONFIGURATION, &["--kernel"]);
}

#[test]
fn a_disk_that_cannot_be_one() {
    let files = Files::new();
    let disk = |option: &str| files.run(&["--disk", option]);
    let absent = text(&files.path("absent.img"));
    refused(&disk(&format!("path={absent}")), CONFIGURATION, &[&absent, "No such file"]);
    let folder = text(files.folder.path());
    refused(&disk(&format!("path={folder}")), CONFIGURATION, &[&folder, "irectory"]);
    let odd = files.sparse("odd.img", (1 << 20) + 100);
    refused(&disk(&format!("path={odd}")), CONFIGURATION, &[&odd, "512"]);
    let odd = files.sparse("odd-4k.img", (1 << 20) + 512);
    refused(&disk(&format!("path={odd},block-size=4096")), CONFIGURATION, &[&odd, "4096"]);
    let empty = files.bytes("empty.img", &[]);
    refused(&disk(&format!("path={empty}")), CONFIGURATION, &[&empty]);
    symlink("loop", files.path("loop")).expect("a link");
    let circle = text(&files.path("loop"));
    refused(&disk(&format!("path={circle}")), CONFIGURATION, &[&circle]);
    // Neither a file nor a block device; opening it would wait for a writer.
    let pipe = files.path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("a FIFO");
    refused(&disk(&format!("path={}", text(&pipe))), CONFIGURATION, &[&text(&pipe)]);
    refused(&disk("path=/dev/null"), CONFIGURATION, &["/dev/null"]);
}

#[test]
fn a_disk_that_is_locked_by_another_process() {
    let files = Files::new();
    let image = files.sparse("locked.img", 1 << 20);
    let holder = File::options().read(true).write(true).open(&image).expect("the image");
    // An open-file-description lock, as ringvm and QEMU hold it.
    rustix::fs::fcntl_lock(&holder, rustix::fs::FlockOperation::NonBlockingLockExclusive).expect("a lock");
    let ended = files.run(&["--disk", &format!("path={image}")]);
    // A lock of another process is what this tests; rustix takes the process's own, which ringvm sees as well.
    assert!([2, 3].contains(&ended.code()), "{}", ended.stderr);
    refused(&ended, ended.code(), &[&image, "lock"]);
}

#[test]
fn a_disk_by_a_number_that_is_not_its_own() {
    let files = Files::new();
    let image = files.sparse("x.img", 1 << 20);
    let disks = |options: &[&str]| {
        // This test may have inherited some itself.
        let inherit = "exec 3>&- 4>&- 5>&- 6>&- 8>&- 9>&- 7<>\"$1\"; shift; exec \"$@\"";
        let ringvm = ringvm_tests::paths::ringvm().expect("the binary is built");
        let mut words = vec!["-c", inherit, "sh", &image, ringvm.to_str().expect("a path of ASCII")];
        words.extend(["run", "--kernel", &files.kernel, "--serial", "null"]);
        options.iter().for_each(|option| words.extend(["--disk", option]));
        program("sh", words).run().unwrap_or_else(|e| panic!("{e}"))
    };
    refused(&disks(&["fd=7", "fd=7"]), CONFIGURATION, &["disk fd 7", "named twice"]);
    // Nobody has inherited these, but ringvm has descriptors of its own there.
    for number in ["3", "4", "5", "6", "8", "9"] {
        let words = [&format!("disk fd {number}"), "Bad file descriptor", "inherit it open"];
        refused(&disks(&[&format!("fd={number}")]), CONFIGURATION, &words);
    }
}

#[test]
fn a_configuration_file_that_is_missing_or_wrong() {
    let files = Files::new();
    let absent = text(&files.path("absent.toml"));
    refused(&run(vec!["--config", &absent]), CONFIGURATION, &[&absent, "No such file"]);
    let kernel = &files.kernel;
    for (number, (toml, words)) in [
        (format!("kernel = {kernel:?}\ncpu = 2\n"), &["line 2", "cpu"][..]),
        (format!("kernel = {kernel:?}\ncpus = \"two\"\n"), &["line 2"]),
        (format!("kernel = {kernel:?}\n\n[[disk]]\npath = \"/x.img\"\ndirct = true\n"), &["line 5", "dirct"]),
        (format!("kernel = {kernel:?}\nmemory = \"0\"\n"), &["memory"]),
        ("kernel = \n".to_owned(), &["line 1"]),
        ("\u{0}\u{1}".to_owned(), &["line 1"]),
        ("cpus = 1\n".to_owned(), &["kernel"]),
    ]
    .into_iter()
    .enumerate()
    {
        let path = files.bytes(&format!("{number}.toml"), toml.as_bytes());
        refused(&run(vec!["--config", &path]), CONFIGURATION, words);
    }
    let binary = files.bytes("binary.toml", &[0xff, 0xfe, 0x00]);
    refused(&run(vec!["--config", &binary]), CONFIGURATION, &[&binary]);
}

#[test]
fn a_serial_file_that_cannot_be_written() {
    let files = Files::new();
    let path = text(&files.path("no-such-folder/console.log"));
    let ended = run(vec!["--kernel", &files.kernel, "--serial", &format!("file={path}")]);
    refused(&ended, CONFIGURATION, &[&path, "No such file"]);
}

#[test]
fn a_serial_file_that_is_something_else() {
    let files = Files::new();
    let serial = |path: &str| run(vec!["--kernel", &files.kernel, "--serial", &format!("file={path}")]);
    // Opening it for writing would wait for a reader.
    let fifo = files.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("a FIFO");
    refused(&serial(&text(&fifo)), CONFIGURATION, &[&text(&fifo), "neither a regular file nor", "name a file, a pty"]);
    let precious = files.bytes("precious", b"kept");
    symlink(&precious, files.path("link")).expect("a link");
    let link = text(&files.path("link"));
    refused(&serial(&link), CONFIGURATION, &[&link, "symbolic link", "name the file itself"]);
    assert_eq!(fs::read(&precious).expect("it is there"), b"kept");
    let folder = text(files.folder.path());
    refused(&serial(&folder), CONFIGURATION, &[&folder, "irectory"]);
    refused(&serial("x,max=0"), CONFIGURATION, &["--serial file=x,max=0", "max=64M"]);
}

#[test]
fn help_is_on_stdout_and_has_examples() {
    for arguments in [&["--help"][..], &["run", "--help"], &["check", "--help"], &["--version"]] {
        let ended = ringvm(arguments).and_then(|vm| vm.run()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((ended.code(), ended.stderr.as_str()), (0, ""), "{arguments:?}");
        assert!(ended.stdout.contains("ringvm"), "{}", ended.stdout);
    }
    let help = ringvm(["run", "--help"]).and_then(|vm| vm.run()).unwrap_or_else(|e| panic!("{e}"));
    for word in ["Example", "--kernel", "--disk", "path=", "--config", "Exit codes", "nested=on", "pmu=on", "max=SIZE"]
    {
        assert!(help.stdout.contains(word), "{word} in {}", help.stdout);
    }
    let nothing = ringvm([""; 0]).and_then(|vm| vm.run()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(nothing.code(), CONFIGURATION, "a usage on stderr");
}

#[test]
fn check_says_what_the_host_offers() {
    let ended = ringvm(["check"]).and_then(|vm| vm.run()).unwrap_or_else(|e| panic!("{e}"));
    for word in ["kvm", "io_uring", "huge", "tap"] {
        assert!(ended.stdout.to_lowercase().contains(word), "{word} in {}", ended.stdout);
    }
    // 3 where something that `run` needs is missing.
    assert!([0, 3].contains(&ended.code()), "{} {}", ended.code(), ended.stderr);
}
