//! Options are defined once: an option that a test adds to a device is in every form of its options, and each form reads back what
//! it has written.

use proptest::prelude::*;
use ringvm_backends::block::{BlockOptions, StorageKind};
use ringvm_backends::net::{Lent, Mac, NetOptions};
use ringvm_backends::options;
use ringvm_backends::options::{Check, Checked, Options};
use ringvm_cli::{help, keyval};
use serde::Serialize;
use serde::de::DeserializeOwned;

options! {
    /// A device of this test.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct TestOptions {
        /// File that is served.
        #[key(positional, value("PATH"))]
        pub path: Option<String>,
        /// Number of queues.
        pub queues: u16 = 1,
        /// How hard the device tries: the option
        /// that this test has added.
        pub extra_effort: bool,
        /// Names of its `friends`.
        pub friends: Vec<String>,
    }
}

impl Check for TestOptions {
    fn check(&self) -> Result<(), String> {
        if self.queues == 0 { Err("queues=0 serves nobody".into()) } else { Ok(()) }
    }
}

options! {
    /// The same device with something beside it.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct TestSpec {
        ..pub device: TestOptions,
        /// What it is called.
        #[key(required)]
        pub r#type: String,
    }
}

#[test]
fn an_added_option_reaches_every_form() {
    let options = TestOptions { path: Some("x".into()), extra_effort: true, ..TestOptions::default() };
    // A daemon's arguments, and the command line.
    assert_eq!(keyval::to_string(&options).unwrap(), "path=x,extra-effort=on");
    assert_eq!(keyval::read::<TestOptions>("x,extra-effort=on"), Ok(options.clone()));
    // The file.
    assert_eq!(toml::to_string(&options).unwrap(), "path = \"x\"\nextra-effort = true\n");
    assert_eq!(toml::from_str::<TestOptions>("path = \"x\"\nextra-effort = true").unwrap(), options);
    // The help.
    assert_eq!(
        help::short::<TestOptions>("Add one"),
        "Add one. Keys: path=PATH, queues=N, extra-effort=on|off, friends=[TEXT,…]"
    );
    assert_eq!(
        help::long::<Checked<TestOptions>>("Add one"),
        "Add one. Keys:\n\
         \x20 - path=PATH: File that is served [path= may be left out where it comes first]\n\
         \x20 - queues=N: Number of queues [default: 1]\n\
         \x20 - extra-effort=on|off: How hard the device tries: the option that this test has added [default: off]\n\
         \x20 - friends=[TEXT,…]: Names of its friends"
    );
    // What has the device's options beside its own.
    let spec = TestSpec { r#type: "t".into(), device: options };
    assert_eq!(keyval::to_string(&spec).unwrap(), "path=x,extra-effort=on,type=t");
    assert_eq!(keyval::read::<TestSpec>("type=t,path=x,extra-effort=on"), Ok(spec));
    assert!(
        help::short::<TestSpec>("Add one")
            .ends_with("Keys: path=PATH, queues=N, extra-effort=on|off, friends=[TEXT,…], type=TEXT")
    );
}

#[test]
fn mistakes_are_named() {
    for (text, expected) in [
        ("type=t,patth=x", "there is no key `patth`; the keys are path, queues, extra-effort, friends, type"),
        ("type=t,type=u", "the key `type` is given twice"),
        ("path=x", "the key `type` is missing"),
        ("type=t,queues=many", "queues: `many` is not a whole number"),
    ] {
        assert_eq!(keyval::read::<TestSpec>(text), Err(expected.into()), "{text}");
    }
    assert_eq!(keyval::read::<Checked<TestOptions>>("x,queues=0"), Err("queues=0 serves nobody".into()));
    for (text, expected) in [
        (
            "type = \"t\"\npatth = 1",
            "unknown field `patth`, expected one of `path`, `queues`, `extra-effort`, `friends`, `type`",
        ),
        ("path = \"t\"", "missing field `type`"),
        ("type = 1", "invalid type: integer `1`, expected a string"),
    ] {
        let error = toml::from_str::<TestSpec>(text).unwrap_err();
        assert_eq!(error.message(), expected, "{text}");
    }
    let error = toml::from_str::<TestSpec>("type = \"t\"\npatth = 1").unwrap_err();
    assert_eq!(error.span(), Some(11..16), "it says where");
}

/// What was written is read again, in each form.
fn assert_round_trip<T>(options: &T)
where
    T: Options + Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let text = keyval::to_string(options).unwrap();
    assert_eq!(keyval::read::<T>(&text).as_ref(), Ok(options), "{text}");
    let file = toml::to_string(options).unwrap();
    assert_eq!(toml::from_str::<T>(&file).as_ref(), Ok(options), "{file}");
}

/// Sizes that TOML, which has no unsigned numbers, can say.
fn size() -> impl Strategy<Value = u64> {
    0..=i64::MAX as u64
}

fn text() -> impl Strategy<Value = String> {
    // With what means something to one of the formats.
    prop_oneof![any::<String>(), r#"[],"='\[\]\\ a\n]{0,6}"#]
}

fn block() -> impl Strategy<Value = BlockOptions> {
    let image = (proptest::option::of(text()), any::<Option<i32>>(), any::<bool>(), proptest::option::of(size()));
    let rest = (any::<(bool, bool)>(), any::<(u16, u16)>(), proptest::option::of(text()), any::<Option<u32>>());
    (image, rest).prop_map(
        |((path, fd, is_null, size), ((direct, readonly), (queues, queue_size), serial, block_size))| {
            let storage = if is_null { StorageKind::Null } else { StorageKind::Raw };
            let path = path.map(Into::into);
            BlockOptions { path, fd, storage, size, direct, readonly, queues, queue_size, serial, block_size }
        },
    )
}

fn net() -> impl Strategy<Value = NetOptions> {
    let port = (proptest::option::of(text()), any::<Vec<i32>>(), proptest::option::of(text()), any::<bool>());
    let lent = proptest::option::of(prop_oneof![Just(Lent::Plain), Just(Lent::Tcp), Just(Lent::All)]);
    let rest = (any::<Option<[u8; 6]>>(), any::<(u16, u16)>(), any::<Option<u16>>(), lent);
    (port, rest).prop_map(|((tap, fds, link, loopback), (mac, (queues, queue_size), mtu, lent))| {
        let mac = mac.map(|mac| Mac([mac[0] & !1 | 2, mac[1], mac[2], mac[3], mac[4], mac[5]]));
        NetOptions { tap, fds, link: link.map(Into::into), loopback, lent, mac, queues, queue_size, mtu }
    })
}

proptest! {
    #[test]
    fn block_options_read_what_they_have_written(options in block()) {
        assert_round_trip(&options);
    }

    #[test]
    fn net_options_read_what_they_have_written(options in net()) {
        assert_round_trip(&options);
    }

    #[test]
    fn lists_and_words_of_any_text_read_what_they_have_written(path in text(), friends in proptest::collection::vec(text(), 0..4)) {
        assert_round_trip(&TestOptions { path: Some(path), friends, ..TestOptions::default() });
    }
}
