//! The parts of a machine besides its devices: vCPUs, memory and the serial port, each an option of a few keys or a
//! word.

use std::fmt;
use std::path::PathBuf;

use ringvm_backends::options;
use ringvm_backends::options::Described;
use ringvm_cli::keyval::{self, parse_size};
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// Default limit of a serial file: more than a person reads, less than a disk holds.
const SERIAL_MAX: u64 = 64 << 20;

/// vCPUs. As an option: `2` or `count=2,nested=on,pmu=on`. Features that are off by default keep parts of KVM that
/// few guests need out of the guest's reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "CpuKeys")]
pub struct CpuConfig {
    /// How many.
    pub count: u32,
    /// Whether the guest may run guests of its own (VMX, SVM).
    pub nested: bool,
    /// Whether the guest has performance counters.
    pub pmu: bool,
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self { count: 1, nested: false, pmu: false }
    }
}

options! {
    /// The keys of [`CpuConfig`], as option and as table.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CpuKeys {
        /// Number of vCPUs.
        #[key(required, positional)]
        pub count: u32 = 1,
        /// Let the guest run guests of its own, where the host can.
        pub nested: bool,
        /// Give the guest performance counters, where the host has them.
        pub pmu: bool,
    }
}

impl Described for CpuConfig {
    type Options = CpuKeys;
}

impl From<CpuKeys> for CpuConfig {
    fn from(keys: CpuKeys) -> Self {
        Self { count: keys.count, nested: keys.nested, pmu: keys.pmu }
    }
}

impl From<CpuConfig> for CpuKeys {
    fn from(cpus: CpuConfig) -> Self {
        Self { count: cpus.count, nested: cpus.nested, pmu: cpus.pmu }
    }
}

impl std::str::FromStr for CpuConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        keyval::read::<CpuKeys>(text).map(Self::from)
    }
}

impl<'de> Deserialize<'de> for CpuConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = CpuConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of vCPUs, or a table with a count")
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<CpuConfig, E> {
                let count =
                    u32::try_from(count).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(count), &self))?;
                Ok(CpuConfig { count, ..CpuConfig::default() })
            }

            fn visit_i64<E: de::Error>(self, count: i64) -> Result<CpuConfig, E> {
                let sound = u64::try_from(count).map_err(|_| E::invalid_value(de::Unexpected::Signed(count), &self))?;
                self.visit_u64(sound)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CpuConfig, A::Error> {
                CpuKeys::deserialize(de::value::MapAccessDeserializer::new(map)).map(CpuConfig::from)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// Guest memory. As an option: `1G` or `size=1G,hugepages=2M,prefault=on,ksm=on`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "MemoryKeys")]
pub struct MemoryConfig {
    /// Size in bytes.
    pub size: u64,
    /// Size of the host's pages that back it, if not the usual.
    pub hugepages: Option<HugePages>,
    /// Take all of it from the host before the guest starts.
    pub prefault: bool,
    /// Let the kernel merge equal pages; the memory is private then, no other process can map it.
    pub ksm: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { size: 512 << 20, hugepages: None, prefault: false, ksm: false }
    }
}

/// Sizes of huge pages.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum HugePages {
    /// 2 MiB.
    #[serde(rename = "2M")]
    TwoMib,
    /// 1 GiB.
    #[serde(rename = "1G")]
    OneGib,
}

impl HugePages {
    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::TwoMib => 2 << 20,
            Self::OneGib => 1 << 30,
        }
    }
}

impl MemoryConfig {
    /// Size of the pages it is made of.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.hugepages.map_or(4096, HugePages::bytes)
    }
}

options! {
    /// The keys of [`MemoryConfig`], as option and as table.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct MemoryKeys {
        /// Size of the guest's memory.
        #[key(required, positional, value("SIZE"))]
        pub size: ByteSize = ByteSize(512 << 20),
        /// Size of the host's pages behind it, if not the usual.
        pub hugepages: Option<HugePages>,
        /// Take all of it from the host before the guest starts. The kernel then also holds it for I/O, which is faster (not with ksm=on).
        pub prefault: bool,
        /// Let the kernel merge equal pages. The memory is private then, so that no daemon can serve the machine.
        pub ksm: bool,
    }
}

impl Described for MemoryConfig {
    type Options = MemoryKeys;
}

impl From<MemoryKeys> for MemoryConfig {
    fn from(keys: MemoryKeys) -> Self {
        Self { size: keys.size.0, hugepages: keys.hugepages, prefault: keys.prefault, ksm: keys.ksm }
    }
}

impl From<MemoryConfig> for MemoryKeys {
    fn from(memory: MemoryConfig) -> Self {
        Self { size: ByteSize(memory.size), hugepages: memory.hugepages, prefault: memory.prefault, ksm: memory.ksm }
    }
}

impl std::str::FromStr for MemoryConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        keyval::read::<MemoryKeys>(text).map(Self::from)
    }
}

impl<'de> Deserialize<'de> for MemoryConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = MemoryConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size like \"1G\", or a table with a size")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<MemoryConfig, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<MemoryConfig, A::Error> {
                MemoryKeys::deserialize(de::value::MapAccessDeserializer::new(map)).map(MemoryConfig::from)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// A number of bytes: `4096`, `512M`, `1G`; the units are powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ByteSize(pub u64);

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Size;
        impl Visitor<'_> for Size {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size like 4096 or \"512M\"")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes).map(ByteSize).map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                parse_size(text).map(ByteSize).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Size)
    }
}

/// The other end of the serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Serial {
    /// Standard input and output.
    #[default]
    Stdio,
    /// A file that is written anew, or a character device such as a pty.
    File {
        /// Where it is.
        path: PathBuf,
        /// Most bytes that are written to a file; what the guest says after that is dropped.
        max: u64,
    },
    /// Nothing.
    Null,
}

impl std::str::FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("file=")) {
            ("stdio", _) => Ok(Self::Stdio),
            ("null", _) => Ok(Self::Null),
            (_, Some(file)) => {
                let (path, max) = match file.rsplit_once(",max=") {
                    Some((path, max)) => (path, parse_size(max).map_err(|error| format!("max: {error}"))?),
                    None => (file, SERIAL_MAX),
                };
                match (path, max) {
                    ("", _) => Err("`file=` needs a path, e.g. file=console.log".into()),
                    (_, 0) => Err("max=0 would keep nothing; use null, or a size like max=64M".into()),
                    _ => Ok(Self::File { path: path.into(), max }),
                }
            }
            _ => Err(format!("`{text}` is not one of stdio, file=PATH, null")),
        }
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::File { path, max } => write!(f, "file={},max={max}", path.display()),
            Self::Null => f.write_str("null"),
        }
    }
}

impl Serialize for Serial {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Serial {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}
