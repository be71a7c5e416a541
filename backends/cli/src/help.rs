//! Help texts for options like `--disk`: what their keys are, from the documentation of the fields.

use std::collections::BTreeMap;

use clap::Arg;
use ringvm_backends::options::{Described, Key, Options};
use serde::{Serialize, Serializer};

use crate::keyval;

/// Adds the keys to the help of an option, which says so far what it is for.
#[must_use]
pub fn keys<T: Described>(arg: Arg) -> Arg {
    let about = arg.get_help().map(ToString::to_string).unwrap_or_default();
    arg.help(short::<T>(&about)).long_help(long::<T>(&about))
}

/// The keys in a line, for `-h`.
#[must_use]
pub fn short<T: Described>(about: &str) -> String {
    let keys = T::Options::keys().iter().map(|key| format!("{}={}", key.name, key.value));
    format!("{about}. Keys: {}", keys.collect::<Vec<_>>().join(", "))
}

/// A line for each key, for `--help`.
#[must_use]
pub fn long<T: Described>(about: &str) -> String {
    let defaults = defaults::<T::Options>();
    let lines = T::Options::keys().iter().map(|key| line(key, defaults.get(&key.name)));
    format!("{about}. Keys:\n{}", lines.collect::<Vec<_>>().join("\n"))
}

fn line(key: &Key, default: Option<&String>) -> String {
    let Key { name, doc, value, is_required, is_positional } = key;
    let mut notes = Vec::new();
    if *is_required {
        notes.push("required".to_owned());
    } else if let Some(default) = default {
        notes.push(format!("default: {default}"));
    }
    if *is_positional {
        notes.push(format!("{name}= may be left out where it comes first"));
    }
    let notes = if notes.is_empty() { String::new() } else { format!(" [{}]", notes.join("; ")) };
    format!("  - {name}={value}: {doc}{notes}")
}

/// The default of each option that has one.
fn defaults<T: Options>() -> BTreeMap<String, String> {
    struct All<T>(T);

    impl<T: Options> Serialize for All<T> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            use serde::ser::SerializeMap as _;
            let mut map = serializer.serialize_map(None)?;
            self.0.write(&mut map, None)?;
            map.end()
        }
    }

    let defaults = keyval::pairs(&All(T::default())).unwrap_or_default().into_iter();
    defaults.filter(|(_, value)| !value.is_empty() && value != "[]").collect()
}
