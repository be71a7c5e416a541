//! Writing options as an option string, or each as a pair of texts.

use std::fmt;

use serde::ser::{Error as _, Impossible, Serialize, SerializeMap, SerializeSeq, SerializeStruct, Serializer};

use super::{Error, Value};

/// Writes options as they are read again: `path=/x.img,direct=on`.
///
/// # Errors
/// For what has no such form: maps in maps, lists of lists, numbers with fractions, paths that are not UTF-8.
pub fn to_string<T: Serialize + ?Sized>(options: &T) -> Result<String, Error> {
    let items = values(options)?.into_iter().map(|(key, value)| format!("{key}={value}"));
    Ok(items.collect::<Vec<_>>().join(","))
}

/// Writes each option as its key and its value.
///
/// # Errors
/// As [`to_string`].
pub fn pairs<T: Serialize + ?Sized>(options: &T) -> Result<Vec<(String, String)>, Error> {
    Ok(values(options)?.into_iter().map(|(key, value)| (key, value.to_string())).collect())
}

fn values<T: Serialize + ?Sized>(options: &T) -> Result<Vec<(String, Value)>, Error> {
    options.serialize(PairsSerializer)
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Word(word) if word.starts_with(['"', '[']) || word.contains(',') => quoted(word, f),
            Self::Word(word) => f.write_str(word),
            Self::List(items) => {
                f.write_str("[")?;
                for (index, item) in items.iter().enumerate() {
                    f.write_str(if index == 0 { "" } else { "," })?;
                    if item.is_empty() || item.starts_with('"') || item.contains([',', ']']) {
                        quoted(item, f)?;
                    } else {
                        f.write_str(item)?;
                    }
                }
                f.write_str("]")
            }
        }
    }
}

fn quoted(word: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "\"{}\"", word.replace('"', "\"\""))
}

impl serde::ser::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

fn unsupported<T>(what: &str) -> Result<T, Error> {
    Err(Error::custom(format!("{what} can't be written as an option")))
}

/// Methods of a serializer for kinds of values that have no form here.
macro_rules! refuse {
    ($($method:ident($($argument:ty),*) -> $result:ty;)*) => {
        $(fn $method(self, $(_: $argument),*) -> Result<$result, Error> {
            unsupported("a value of this kind")
        })*
    };
}

/// The options as a whole.
struct PairsSerializer;

/// Pairs so far, and the key whose value comes next.
#[derive(Default)]
struct PairsWriter {
    pairs: Vec<(String, Value)>,
    key: Option<String>,
}

impl PairsWriter {
    fn add<T: Serialize + ?Sized>(&mut self, key: String, value: &T) -> Result<(), Error> {
        if let Some(value) = value.serialize(ValueSerializer)? {
            self.pairs.push((key, value));
        }
        Ok(())
    }
}

impl Serializer for PairsSerializer {
    type Ok = Vec<(String, Value)>;
    type Error = Error;
    type SerializeSeq = Impossible<Self::Ok, Error>;
    type SerializeTuple = Impossible<Self::Ok, Error>;
    type SerializeTupleStruct = Impossible<Self::Ok, Error>;
    type SerializeTupleVariant = Impossible<Self::Ok, Error>;
    type SerializeMap = PairsWriter;
    type SerializeStruct = PairsWriter;
    type SerializeStructVariant = Impossible<Self::Ok, Error>;

    refuse! {
        serialize_bool(bool) -> Self::Ok;
        serialize_i8(i8) -> Self::Ok;
        serialize_i16(i16) -> Self::Ok;
        serialize_i32(i32) -> Self::Ok;
        serialize_i64(i64) -> Self::Ok;
        serialize_u8(u8) -> Self::Ok;
        serialize_u16(u16) -> Self::Ok;
        serialize_u32(u32) -> Self::Ok;
        serialize_u64(u64) -> Self::Ok;
        serialize_f32(f32) -> Self::Ok;
        serialize_f64(f64) -> Self::Ok;
        serialize_char(char) -> Self::Ok;
        serialize_str(&str) -> Self::Ok;
        serialize_bytes(&[u8]) -> Self::Ok;
        serialize_none() -> Self::Ok;
        serialize_unit() -> Self::Ok;
        serialize_unit_struct(&'static str) -> Self::Ok;
        serialize_unit_variant(&'static str, u32, &'static str) -> Self::Ok;
        serialize_seq(Option<usize>) -> Self::SerializeSeq;
        serialize_tuple(usize) -> Self::SerializeTuple;
        serialize_tuple_struct(&'static str, usize) -> Self::SerializeTupleStruct;
        serialize_tuple_variant(&'static str, u32, &'static str, usize) -> Self::SerializeTupleVariant;
        serialize_struct_variant(&'static str, u32, &'static str, usize) -> Self::SerializeStructVariant;
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Self::Ok, Error> {
        value.serialize(self)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<Self::Ok, Error> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<Self::Ok, Error> {
        unsupported("a value of this kind")
    }

    fn serialize_map(self, _: Option<usize>) -> Result<PairsWriter, Error> {
        Ok(PairsWriter::default())
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<PairsWriter, Error> {
        Ok(PairsWriter::default())
    }
}

impl SerializeMap for PairsWriter {
    type Ok = Vec<(String, Value)>;
    type Error = Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Error> {
        self.key = match key.serialize(ValueSerializer)? {
            Some(Value::Word(key)) => Some(key),
            _ => return unsupported("a key that is not a word"),
        };
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        let key = self.key.take().ok_or_else(|| Error("a value was given before its key".into()))?;
        self.add(key, value)
    }

    fn end(self) -> Result<Self::Ok, Error> {
        Ok(self.pairs)
    }
}

impl SerializeStruct for PairsWriter {
    type Ok = Vec<(String, Value)>;
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, key: &'static str, value: &T) -> Result<(), Error> {
        self.add(key.to_owned(), value)
    }

    fn end(self) -> Result<Self::Ok, Error> {
        Ok(self.pairs)
    }
}

/// One value; `None` is one that is left out.
struct ValueSerializer;

/// Methods for values whose text is that of `Display`.
macro_rules! words {
    ($($method:ident $type:ty)*) => {
        $(fn $method(self, value: $type) -> Result<Option<Value>, Error> {
            Ok(Some(Value::Word(value.to_string())))
        })*
    };
}

impl Serializer for ValueSerializer {
    type Ok = Option<Value>;
    type Error = Error;
    type SerializeSeq = ListWriter;
    type SerializeTuple = Impossible<Self::Ok, Error>;
    type SerializeTupleStruct = Impossible<Self::Ok, Error>;
    type SerializeTupleVariant = Impossible<Self::Ok, Error>;
    type SerializeMap = Impossible<Self::Ok, Error>;
    type SerializeStruct = Impossible<Self::Ok, Error>;
    type SerializeStructVariant = Impossible<Self::Ok, Error>;

    words! {
        serialize_i8 i8 serialize_i16 i16 serialize_i32 i32 serialize_i64 i64
        serialize_u8 u8 serialize_u16 u16 serialize_u32 u32 serialize_u64 u64
        serialize_char char serialize_str &str
    }

    refuse! {
        serialize_f32(f32) -> Self::Ok;
        serialize_f64(f64) -> Self::Ok;
        serialize_bytes(&[u8]) -> Self::Ok;
        serialize_unit() -> Self::Ok;
        serialize_unit_struct(&'static str) -> Self::Ok;
        serialize_tuple(usize) -> Self::SerializeTuple;
        serialize_tuple_struct(&'static str, usize) -> Self::SerializeTupleStruct;
        serialize_tuple_variant(&'static str, u32, &'static str, usize) -> Self::SerializeTupleVariant;
        serialize_map(Option<usize>) -> Self::SerializeMap;
        serialize_struct(&'static str, usize) -> Self::SerializeStruct;
        serialize_struct_variant(&'static str, u32, &'static str, usize) -> Self::SerializeStructVariant;
    }

    fn serialize_bool(self, value: bool) -> Result<Option<Value>, Error> {
        self.serialize_str(if value { "on" } else { "off" })
    }

    fn serialize_none(self) -> Result<Option<Value>, Error> {
        Ok(None)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Option<Value>, Error> {
        value.serialize(self)
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, name: &'static str) -> Result<Option<Value>, Error> {
        self.serialize_str(name)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<Self::Ok, Error> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<Self::Ok, Error> {
        unsupported("a value of this kind")
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<ListWriter, Error> {
        Ok(ListWriter(Vec::new()))
    }
}

/// Items of a list so far.
struct ListWriter(Vec<String>);

impl SerializeSeq for ListWriter {
    type Ok = Option<Value>;
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, item: &T) -> Result<(), Error> {
        match item.serialize(ValueSerializer)? {
            Some(Value::Word(word)) => self.0.push(word),
            _ => return unsupported("a list in a list"),
        }
        Ok(())
    }

    fn end(self) -> Result<Option<Value>, Error> {
        Ok(Some(Value::List(self.0)))
    }
}
