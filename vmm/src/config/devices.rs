//! A user's description of a device: its name, where it is served, and the options of its server.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ringvm_backends::block::BlockOptions;
use ringvm_backends::net::NetOptions;
use ringvm_backends::options::{self, Check, Checked, Described};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where the queues of a device are served.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// On I/O threads of the process that has the guest.
    #[default]
    Process,
    /// In a process of their own, which ringvm starts.
    Daemon,
}

/// Name of a device in logs, statistics and messages: 1 to 32 letters, digits, `_` and `-`, of which the first is a letter.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName(String);

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        let starts_well = text.starts_with(|first: char| first.is_ascii_alphabetic());
        if !starts_well || text.len() > 32 || !text.bytes().all(is_part) {
            return Err(format!(
                "{text:?} is not a name of 1 to 32 letters, digits, _ and -, of which the first is a letter"
            ));
        }
        Ok(Self(text))
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.0
    }
}

impl DeviceName {
    /// The name that a device was given, or one made of its kind and position.
    pub(super) fn or_default(id: Option<&Self>, kind: &str, index: usize) -> String {
        id.map_or_else(|| format!("{kind}{index}"), |name| name.0.clone())
    }
}

/// A device that ringvm may serve itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec<O> {
    /// Its name, if it was given one.
    pub id: Option<DeviceName>,
    /// The server of its queues.
    pub backend: Backend<O>,
}

/// The server of a device's queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend<O> {
    /// A backend of ringvm's own.
    Own {
        /// Where it runs at first.
        place: Place,
        /// Its options.
        options: Checked<O>,
    },
    /// A daemon that runs already.
    Socket {
        /// Where it listens.
        path: PathBuf,
        /// Number of queues, or queue pairs.
        queues: u16,
        /// Descriptors per queue.
        queue_size: u16,
    },
}

impl<O> DeviceSpec<O> {
    /// The options of a device that ringvm serves itself.
    #[must_use]
    pub fn options(&self) -> Option<&Checked<O>> {
        match &self.backend {
            Backend::Own { options, .. } => Some(options),
            Backend::Socket { .. } => None,
        }
    }

    /// The options of a device whose queues this process serves at first.
    #[must_use]
    pub fn options_here(&self) -> Option<&Checked<O>> {
        match &self.backend {
            Backend::Own { place: Place::Process, options } => Some(options),
            _ => None,
        }
    }
}

/// A disk.
pub type DiskSpec = DeviceSpec<BlockOptions>;
/// A NIC.
pub type NetSpec = DeviceSpec<NetOptions>;

impl DiskSpec {
    /// Name of the disk of this index.
    #[must_use]
    pub fn name(&self, index: usize) -> String {
        DeviceName::or_default(self.id.as_ref(), "disk", index)
    }
}

impl NetSpec {
    /// Name of the NIC of this index.
    #[must_use]
    pub fn name(&self, index: usize) -> String {
        DeviceName::or_default(self.id.as_ref(), "net", index)
    }
}

ringvm_backends::options! {
    /// A disk as the command line and the configuration file describe it.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct DiskOptions {
        ..pub disk: BlockOptions,
        /// Name of the device in logs, statistics and messages. Without it, disk0, disk1 and so on.
        #[key(value("NAME"))]
        pub id: Option<DeviceName>,
        /// Serve the disk in this process, or in a daemon that ringvm starts.
        pub place: Place,
        /// Socket of a daemon that serves the disk already. Of the other options only id, queues and queue-size are given here then.
        #[key(value("PATH"))]
        pub socket: Option<PathBuf>,
    }
}

ringvm_backends::options! {
    /// A NIC as the command line and the configuration file describe it.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct NicOptions {
        ..pub nic: NetOptions,
        /// Name of the device in logs, statistics and messages. Without it, net0, net1 and so on.
        #[key(value("NAME"))]
        pub id: Option<DeviceName>,
        /// Serve the NIC in this process, or in a daemon that ringvm starts.
        pub place: Place,
        /// Socket of a daemon that serves the NIC already. Of the other options only id and queue-size are given here then.
        #[key(value("PATH"))]
        pub socket: Option<PathBuf>,
    }
}

const EMPTY_SOCKET: &str = "socket= is empty, give the path where the daemon listens";

fn check_socket(path: &Path) -> Result<(), String> {
    if path.as_os_str().is_empty() { Err(EMPTY_SOCKET.to_owned()) } else { Ok(()) }
}

impl TryFrom<DiskOptions> for DiskSpec {
    type Error = String;

    fn try_from(options: DiskOptions) -> Result<Self, String> {
        let DiskOptions { disk, id, place, socket } = options;
        let Some(path) = socket else {
            return Ok(Self { id, backend: Backend::Own { place, options: Checked::new(disk)? } });
        };
        let BlockOptions { queues, queue_size, .. } = disk;
        if place != Place::default() || disk != (BlockOptions { queues, queue_size, ..BlockOptions::default() }) {
            return Err("with socket= only id=, queues= and queue-size= are said here, the rest to the daemon".into());
        }
        check_socket(&path)?;
        disk.check_queues()?;
        Ok(Self { id, backend: Backend::Socket { path, queues, queue_size } })
    }
}

impl From<DiskSpec> for DiskOptions {
    fn from(DeviceSpec { id, backend }: DiskSpec) -> Self {
        match backend {
            Backend::Own { place, options } => Self { id, place, socket: None, disk: options.into_inner() },
            Backend::Socket { path, queues, queue_size } => {
                let disk = BlockOptions { queues, queue_size, ..BlockOptions::default() };
                Self { id, place: Place::default(), socket: Some(path), disk }
            }
        }
    }
}

impl TryFrom<NicOptions> for NetSpec {
    type Error = String;

    fn try_from(options: NicOptions) -> Result<Self, String> {
        let NicOptions { nic, id, place, socket } = options;
        let Some(path) = socket else {
            return Ok(Self { id, backend: Backend::Own { place, options: Checked::new(nic)? } });
        };
        let NetOptions { queues, queue_size, .. } = nic;
        if place != Place::default() || nic != (NetOptions { queue_size, ..NetOptions::default() }) {
            return Err("with socket= only id= and queue-size= are said here, the rest to the daemon".into());
        }
        check_socket(&path)?;
        nic.check_queue_size()?;
        Ok(Self { id, backend: Backend::Socket { path, queues, queue_size } })
    }
}

impl From<NetSpec> for NicOptions {
    fn from(DeviceSpec { id, backend }: NetSpec) -> Self {
        match backend {
            Backend::Own { place, options } => Self { id, place, socket: None, nic: options.into_inner() },
            Backend::Socket { path, queue_size, .. } => {
                let nic = NetOptions { queue_size, ..NetOptions::default() };
                Self { id, place: Place::default(), socket: Some(path), nic }
            }
        }
    }
}

/// Reading a specification checks it; writing it writes the options it was read from.
macro_rules! described_by {
    ($($spec:ty: $options:ty),*) => {
        $(
            impl Described for $spec {
                type Options = $options;
            }

            impl<'de> Deserialize<'de> for $spec {
                fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                    options::deserialize(deserializer, |options: $options| options.try_into())
                }
            }

            impl Serialize for $spec {
                fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                    <$options>::from(self.clone()).serialize(serializer)
                }
            }
        )*
    };
}

described_by!(DiskSpec: DiskOptions, NetSpec: NicOptions);

ringvm_backends::options! {
    /// A device of any kind that a daemon serves.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct VhostUserOptions {
        /// What the device is: net, blk, console, rng, scsi, 9p, gpu, input, vsock, fs, pmem, or a virtio device ID.
        #[key(required, value("NAME|ID"))]
        pub r#type: DeviceType = DeviceType(1),
        /// Where the daemon listens.
        #[key(required, value("PATH"))]
        pub socket: PathBuf,
        /// Queues that the driver gets. Without it, all that the daemon has.
        pub queues: Option<u16>,
        /// Descriptors per queue, a power of two of at most 32768.
        pub queue_size: u16 = 256,
        /// Name of the device in logs, statistics and messages. Without it, vhost0, vhost1 and so on.
        #[key(value("NAME"))]
        pub id: Option<DeviceName>,
    }
}

impl VhostUserOptions {
    /// Name of the device of this index.
    #[must_use]
    pub fn name(&self, index: usize) -> String {
        DeviceName::or_default(self.id.as_ref(), "vhost", index)
    }
}

impl Check for VhostUserOptions {
    fn check(&self) -> Result<(), String> {
        check_queue_size(self.queue_size)?;
        check_socket(&self.socket)
    }
}

fn check_queue_size(size: u16) -> Result<(), String> {
    if size.is_power_of_two() && size <= 1 << 15 {
        return Ok(());
    }
    Err(format!("queue-size={size} is not a power of two from 1 to 32768"))
}

ringvm_backends::options! {
    /// A file system that a daemon shares with the guest.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct FsOptions {
        /// Name that the guest mounts it by, at most 36 bytes.
        #[key(required, value("NAME"))]
        pub tag: String,
        /// Where its daemon listens, such as virtiofsd.
        #[key(required, value("PATH"))]
        pub socket: PathBuf,
        /// Number of request queues, 1 to 63.
        pub queues: u16 = 1,
        /// Descriptors per queue, a power of two of at most 32768.
        pub queue_size: u16 = 1024,
        /// Name of the device in logs, statistics and messages. Without it, fs0, fs1 and so on.
        #[key(value("NAME"))]
        pub id: Option<DeviceName>,
    }
}

/// Length of the tag in the configuration space (virtio 1.3, section 5.11.4).
const TAG_LEN: usize = 36;

impl FsOptions {
    /// Name of the device of this index.
    #[must_use]
    pub fn name(&self, index: usize) -> String {
        DeviceName::or_default(self.id.as_ref(), "fs", index)
    }

    /// The configuration space: the tag, and the number of request queues. Daemons leave both to the VMM.
    #[must_use]
    pub fn config_space(&self) -> Vec<u8> {
        let mut space = self.tag.as_bytes().to_vec();
        space.resize(TAG_LEN, 0);
        space.extend(u32::from(self.queues).to_le_bytes());
        space
    }
}

impl Check for FsOptions {
    fn check(&self) -> Result<(), String> {
        if self.tag.is_empty() || self.tag.len() > TAG_LEN || self.tag.contains('\0') {
            return Err(format!("tag={} is not a name of 1 to {TAG_LEN} bytes", self.tag));
        }
        if !(1..=63).contains(&self.queues) {
            return Err(format!("queues={} is not from 1 to 63", self.queues));
        }
        check_queue_size(self.queue_size)?;
        check_socket(&self.socket)
    }
}

/// A virtio device ID (virtio 1.3, section 5), written by name where it has one.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceType(pub u32);

impl DeviceType {
    const NAMES: [(&str, u32); 11] = [
        ("net", 1),
        ("blk", 2),
        ("console", 3),
        ("rng", 4),
        ("scsi", 8),
        ("9p", 9),
        ("gpu", 16),
        ("input", 18),
        ("vsock", 19),
        ("fs", 26),
        ("pmem", 27),
    ];
}

impl FromStr for DeviceType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::NAMES.iter().find(|(name, _)| *name == text).map(|(_, id)| *id);
        let number = || text.parse().ok().filter(|id| (1..64).contains(id));
        known.or_else(number).map(Self).ok_or_else(|| {
            let names: Vec<_> = Self::NAMES.iter().map(|(name, _)| *name).collect();
            format!("type={text} is not one of {}, or a virtio device ID from 1 to 63", names.join(", "))
        })
    }
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMES.iter().find(|(_, id)| *id == self.0) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

impl TryFrom<String> for DeviceType {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceType> for String {
    fn from(device_type: DeviceType) -> Self {
        device_type.to_string()
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use proptest::prelude::*;
    use ringvm_backends::block::StorageKind;
    use ringvm_backends::net::Mac;
    use ringvm_cli::keyval;
    use serde::de::DeserializeOwned;

    use super::*;

    #[test]
    fn names_are_short_words() {
        let name = |text: &str| DeviceName::try_from(text.to_owned());
        for text in ["a", "root_disk-0", &"x".repeat(32)] {
            assert_eq!(DeviceName::or_default(Some(&name(text).unwrap()), "disk", 7), text);
        }
        for text in ["", "0a", "-a", "a b", "a.b", "a/b", "\u{e9}", &"x".repeat(33)] {
            assert!(name(text).unwrap_err().contains("1 to 32"), "{text}");
        }
        assert_eq!(DeviceName::or_default(None, "disk", 7), "disk7");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            ("path=x,socket=y", "with socket= only id=, queues= and queue-size= are said here"),
            ("place=daemon,socket=y", "with socket= only"),
            ("socket=", "socket= is empty"),
            ("socket=y,queues=0", "queues=0 is not from 1 to 64"),
            ("path=x,place=cellar", "place: `cellar` is not one of process, daemon"),
            ("path=x,id=a b", "id: \"a b\" is not a name of 1 to 32"),
            (
                "path=x,plaice=daemon",
                "there is no key `plaice`; the keys are path, fd, storage, size, direct, readonly, queues, queue-size, serial, block-size, id, place, socket",
            ),
        ] {
            let error = keyval::read::<DiskSpec>(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        for (text, expected) in [
            ("tap=a,socket=y", "with socket= only id= and queue-size= are said here"),
            ("socket=y,queues=2", "with socket= only"),
            ("socket=", "socket= is empty"),
            ("socket=y,queue-size=3", "queue-size=3 is not a power of two"),
        ] {
            let error = keyval::read::<NetSpec>(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        for (text, expected) in [
            ("socket=y", "the key `type` is missing"),
            ("type=fs", "the key `socket` is missing"),
            ("type=fs,socket=", "socket= is empty"),
            ("type=cat,socket=y", "type=cat is not one of net, blk"),
            ("type=64,socket=y", "type=64 is not one of net, blk"),
            ("type=fs,socket=y,queue-size=3", "queue-size=3"),
        ] {
            let error = keyval::read::<Checked<VhostUserOptions>>(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    /// A written specification reads back as the same value, in each form.
    fn assert_round_trip<T: Described + Serialize + DeserializeOwned + PartialEq + Debug>(spec: &T) {
        let text = keyval::to_string(spec).unwrap();
        assert_eq!(keyval::read::<T>(&text).as_ref(), Ok(spec), "{text}");
        let file = toml::to_string(spec).unwrap();
        assert_eq!(toml::from_str::<T>(&file).as_ref(), Ok(spec), "{file}");
    }

    fn id() -> impl Strategy<Value = Option<DeviceName>> {
        proptest::option::of("[A-Za-z][A-Za-z0-9_-]{0,31}")
            .prop_map(|id| id.map(|id| DeviceName::try_from(id).unwrap()))
    }

    fn place() -> impl Strategy<Value = Place> {
        prop_oneof![Just(Place::Process), Just(Place::Daemon)]
    }

    fn path() -> impl Strategy<Value = PathBuf> {
        r#"[^\x00]{1,9}|[\[\],"=]{1,9}"#.prop_map(PathBuf::from)
    }

    fn disk() -> impl Strategy<Value = BlockOptions> {
        let image = prop_oneof![
            path().prop_map(|path| BlockOptions { path: Some(path), ..BlockOptions::default() }),
            (3..=i32::MAX).prop_map(|fd| BlockOptions { fd: Some(fd), ..BlockOptions::default() }),
            (0..=i64::MAX as u64).prop_map(|size| BlockOptions {
                storage: StorageKind::Null,
                size: Some(size),
                ..BlockOptions::default()
            }),
        ];
        let rest = (any::<(bool, bool)>(), 1..=64_u16, 2..=10_u16, proptest::option::of("[ -~]{0,20}"), 0..5_u32);
        (image, rest).prop_map(|(image, ((direct, readonly), queues, bits, serial, block))| BlockOptions {
            direct: direct && image.storage == StorageKind::Raw,
            readonly,
            queues,
            queue_size: 1 << bits,
            serial,
            block_size: (block < 4).then_some(512 << block),
            ..image
        })
    }

    fn nic() -> impl Strategy<Value = NetOptions> {
        let port = prop_oneof![
            "[a-z0-9]{1,15}".prop_map(|tap| NetOptions { tap: Some(tap), ..NetOptions::default() }),
            path().prop_map(|link| NetOptions { link: Some(link), ..NetOptions::default() }),
            proptest::collection::vec(3..1000, 1..=32).prop_map(|fds| NetOptions { fds, ..NetOptions::default() }),
            Just(NetOptions { loopback: true, ..NetOptions::default() }),
        ];
        let rest = (any::<Option<[u8; 5]>>(), 1..=32_u16, 6..=12_u16, proptest::option::of(68..=65520_u16));
        (port, rest).prop_map(|(port, (mac, queues, bits, mtu))| NetOptions {
            mac: mac.map(|mac| Mac([2, mac[0], mac[1], mac[2], mac[3], mac[4]])),
            queues: if port.fds.is_empty() { queues } else { port.fds.len() as u16 },
            queue_size: 1 << bits,
            mtu,
            ..port
        })
    }

    fn own<O: Check + Debug + Clone>(options: impl Strategy<Value = O>) -> impl Strategy<Value = Backend<O>> {
        (place(), options).prop_map(|(place, options)| Backend::Own { place, options: Checked::new(options).unwrap() })
    }

    fn socket<O: Debug>(queues: impl Strategy<Value = u16>) -> impl Strategy<Value = Backend<O>> {
        (path(), queues, 6..=10_u16).prop_map(|(path, queues, bits)| Backend::Socket {
            path,
            queues,
            queue_size: 1 << bits,
        })
    }

    proptest! {
        #[test]
        fn disks_read_what_they_have_written(id in id(), backend in prop_oneof![own(disk()), socket(1..=64_u16)]) {
            assert_round_trip(&DiskSpec { id, backend });
        }

        #[test]
        fn nics_read_what_they_have_written(id in id(), backend in prop_oneof![own(nic()), socket(Just(1))]) {
            assert_round_trip(&NetSpec { id, backend });
        }

        #[test]
        fn file_systems_read_what_they_have_written(
            id in id(),
            tag in "[^\0]{1,9}",
            socket in path(),
            queues in 1..=63_u16,
            bits in 0..=15_u16,
        ) {
            let options = FsOptions { tag, socket, queues, queue_size: 1 << bits, id };
            assert_eq!(options.config_space().len(), TAG_LEN + 4);
            assert_round_trip(&Checked::new(options).unwrap());
        }

        #[test]
        fn vhost_user_devices_read_what_they_have_written(
            id in id(),
            device_type in 1..64_u32,
            socket in path(),
            queues in any::<Option<u16>>(),
            bits in 0..=15_u16,
        ) {
            let options =
                VhostUserOptions { r#type: DeviceType(device_type), socket, queues, queue_size: 1 << bits, id };
            assert_round_trip(&Checked::new(options).unwrap());
        }
    }
}
