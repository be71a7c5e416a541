//! Options of a device, defined once.
//!
//! [`options!`](crate::options!) turns the definition of a structure into everything that an option needs: reading (command line,
//! configuration file, a daemon's arguments), writing, defaults, and the list of [`Key`]s from which help texts are made. The
//! formats themselves are serde's and `ringvm-cli`'s.

mod read;
mod shape;

use std::ops::Deref;

use serde::de::MapAccess;
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use read::deserialize;
pub use shape::shape;

#[doc(hidden)]
pub use serde;

/// One option: what a help text says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Name, as users write it.
    pub name: String,
    /// What it means: the documentation of the field, without markup.
    pub doc: String,
    /// What a value looks like, e.g. `PATH` or `on|off`.
    pub value: String,
    /// Whether it must be given.
    pub is_required: bool,
    /// Whether the first value of an option string may stand without its key and is meant for this one then.
    pub is_positional: bool,
}

impl Key {
    /// The option that a field stands for.
    #[doc(hidden)]
    #[must_use]
    pub fn new(field: &str, doc: &str, value: String) -> Self {
        let doc = doc.trim().trim_end_matches('.').replace('`', "");
        Self { name: name_of(field), doc, value, is_required: false, is_positional: false }
    }

    /// Says what a value looks like.
    #[doc(hidden)]
    #[must_use]
    pub fn value(self, value: &str) -> Self {
        Self { value: value.to_owned(), ..self }
    }

    /// Must be given.
    #[doc(hidden)]
    #[must_use]
    pub fn required(self) -> Self {
        Self { is_required: true, ..self }
    }

    /// May be given without its key if it comes first.
    #[doc(hidden)]
    #[must_use]
    pub fn positional(self) -> Self {
        Self { is_positional: true, ..self }
    }
}

/// The option that a field of this name stands for: `queue_size` is `queue-size`.
#[doc(hidden)]
#[must_use]
pub fn name_of(field: &str) -> String {
    field.trim_start_matches("r#").replace('_', "-")
}

/// A structure of options. [`options!`](crate::options!) implements it.
pub trait Options: Default + 'static {
    /// All options, in the order of their definition.
    fn keys() -> &'static [Key];

    /// The names of all options.
    fn names() -> &'static [&'static str];

    /// Reads the value of the option `name`. Returns false if there is no such option.
    ///
    /// # Errors
    /// When the value is not one of the option's type.
    fn read<'de, A: MapAccess<'de>>(&mut self, name: &str, map: &mut A) -> Result<bool, A::Error>;

    /// Writes the options, except those whose values equal those of `defaults`.
    ///
    /// # Errors
    /// When the format can't hold a value.
    fn write<M: SerializeMap>(&self, map: &mut M, defaults: Option<&Self>) -> Result<(), M::Error>;
}

/// A value that is read from options: the options themselves, or a type built from them.
pub trait Described {
    /// Its options.
    type Options: Options;
}

impl<T: Options> Described for T {
    type Options = T;
}

/// Writes options, without those that have their default value.
///
/// # Errors
/// When the format can't hold a value.
pub fn serialize<T: Options, S: Serializer>(options: &T, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    options.write(&mut map, Some(&T::default()))?;
    map.end()
}

/// Options that can be wrong, alone or together, beyond the types of their values.
pub trait Check {
    /// Checks what can be checked without touching the host.
    ///
    /// # Errors
    /// One line about the first thing found: what is wrong and what to do.
    fn check(&self) -> Result<(), String>;
}

/// Options that were checked. Reading them checks them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked<T>(T);

impl<T: Check> Checked<T> {
    /// Checks options.
    ///
    /// # Errors
    /// As [`Check::check`].
    pub fn new(options: T) -> Result<Self, String> {
        options.check().map(|()| Self(options))
    }
}

impl<T> Checked<T> {
    /// The options, to be changed.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> Deref for Checked<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Options> Described for Checked<T> {
    type Options = T;
}

impl<'de, T: Options + Check> Deserialize<'de> for Checked<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize(deserializer, Self::new)
    }
}

impl<T: Serialize> Serialize for Checked<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

/// Defines a structure of options.
///
/// A field is an option: `queue_size` is written `queue-size`, its documentation is its help text. `= value` behind the type gives it
/// a default other than that of the type. Its type says what its values look like; attributes say more:
///
/// - `#[key(value("PATH"))]`: values are shown like this in help texts
/// - `#[key(required)]`: the option must be given
/// - `#[key(positional)]`: the first item of an option string may be the value alone
/// - `#[arg(…)]`: for clap, with a derived `clap::Args`
///
/// The options of a first field with `..` in front stand beside those of the structure, not in a table of their own.
///
/// ```
/// ringvm_backends::options! {
///     /// A thermometer.
///     #[derive(Clone, Debug, PartialEq, Eq)]
///     pub struct ThermometerOptions {
///         /// File that the temperature is read from.
///         #[key(positional, value("PATH"))]
///         pub file: String,
///         /// Reads per second.
///         pub read_rate: u32 = 10,
///     }
/// }
/// ```
#[macro_export]
macro_rules! options {
    (
        $(#[doc = $about:literal])*
        $(#[derive($($derive:path),* $(,)?)])?
        pub struct $name:ident {
            $(.. pub $rest:ident: $rest_type:ty,)?
            $(
                $(#[doc = $doc:literal])*
                $(#[key($($property:ident $(($argument:literal))?),* $(,)?)])?
                $(#[arg($($arg:tt)*)])*
                pub $field:ident: $type:ty $(= $default:expr)?
            ),* $(,)?
        }
    ) => {
        $(#[doc = $about])*
        $(#[derive($($derive),*)])?
        pub struct $name {
            $(
                /// Options of the flattened structure.
                pub $rest: $rest_type,
            )?
            $(
                $(#[doc = $doc])*
                $(#[arg($($arg)*)])*
                pub $field: $type,
            )*
        }

        impl ::core::default::Default for $name {
            fn default() -> Self {
                Self {
                    $($field: $crate::options!(@default $($default)?),)*
                    $($rest: ::core::default::Default::default(),)?
                }
            }
        }

        impl $crate::options::Options for $name {
            fn keys() -> &'static [$crate::options::Key] {
                static KEYS: ::std::sync::LazyLock<::std::vec::Vec<$crate::options::Key>> =
                    ::std::sync::LazyLock::new(|| {
                        let own = ::std::vec![
                            $(
                                $crate::options::Key::new(
                                    stringify!($field),
                                    concat!($($doc),*),
                                    $crate::options::shape::<$type>(),
                                )
                                $($(.$property($($argument)?))*)?
                            ),*
                        ];
                        $(let own = [<$rest_type as $crate::options::Options>::keys(), &own[..]].concat();)?
                        own
                    });
                &KEYS
            }

            fn names() -> &'static [&'static str] {
                static NAMES: ::std::sync::LazyLock<::std::vec::Vec<&'static str>> = ::std::sync::LazyLock::new(|| {
                    <$name as $crate::options::Options>::keys().iter().map(|key| key.name.as_str()).collect()
                });
                &NAMES
            }

            fn read<'de, A: $crate::options::serde::de::MapAccess<'de>>(
                &mut self,
                name: &str,
                map: &mut A,
            ) -> ::core::result::Result<bool, A::Error> {
                $(
                    if name == $crate::options::name_of(stringify!($field)) {
                        self.$field = map.next_value()?;
                        return Ok(true);
                    }
                )*
                $(
                    if $crate::options::Options::read(&mut self.$rest, name, map)? {
                        return Ok(true);
                    }
                )?
                Ok(false)
            }

            fn write<M: $crate::options::serde::ser::SerializeMap>(
                &self,
                map: &mut M,
                defaults: ::core::option::Option<&Self>,
            ) -> ::core::result::Result<(), M::Error> {
                let mut keys = <Self as $crate::options::Options>::keys().iter();
                $(
                    $crate::options::Options::write(&self.$rest, map, defaults.map(|defaults| &defaults.$rest))?;
                    keys.nth(<$rest_type as $crate::options::Options>::keys().len() - 1);
                )?
                $(
                    if let Some(key) = keys.next()
                        && (key.is_required || defaults.is_none_or(|defaults| defaults.$field != self.$field))
                    {
                        map.serialize_entry(&key.name, &self.$field)?;
                    }
                )*
                Ok(())
            }
        }

        impl<'de> $crate::options::serde::Deserialize<'de> for $name {
            fn deserialize<D: $crate::options::serde::Deserializer<'de>>(
                deserializer: D,
            ) -> ::core::result::Result<Self, D::Error> {
                $crate::options::deserialize(deserializer, Ok)
            }
        }

        impl $crate::options::serde::Serialize for $name {
            fn serialize<S: $crate::options::serde::Serializer>(
                &self,
                serializer: S,
            ) -> ::core::result::Result<S::Ok, S::Error> {
                $crate::options::serialize(self, serializer)
            }
        }
    };
    (@default) => { ::core::default::Default::default() };
    (@default $default:expr) => { $default };
}
