//! Walks the tree of a file, and notes every error on the way: wrong, missing, unknown and repeated keys.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::path::Path;

use super::ConfigError;
use super::yaml::{Entry, Node, Value};

/// `None` from one of its methods always comes with an error noted.
pub(super) struct Reader<'a> {
    pub(super) file: &'a Path,
    pub(super) errors: Vec<ConfigError>,
}

/// A map whose keys are known.
pub(super) struct Section<'a> {
    /// `heartbeat`, `services[2]`; empty for the root.
    pub(super) path: String,
    pub(super) line: usize,
    pub(super) entries: &'a [Entry],
}

/// A value and the path to it.
pub(super) struct Field<'a> {
    pub(super) path: String,
    pub(super) node: &'a Node,
}

impl<'a> Section<'a> {
    pub(super) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<Field<'a>> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        Some(Field {
            path: self.path_of(key),
            node: &entry.value,
        })
    }
}

impl<'a> Reader<'a> {
    pub(super) fn error(
        &mut self,
        line: usize,
        field: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.errors.push(ConfigError {
            file: self.file.to_owned(),
            line: Some(line),
            field: field.into(),
            found: found.into(),
            expected: expected.into(),
        });
    }

    /// A value that is not what it should be.
    pub(super) fn mismatch(&mut self, field: &Field, expected: impl Into<String>) {
        let found = match &field.node.value {
            Value::Null => "nothing".to_owned(),
            Value::Scalar(text) => format!("{text:?}"),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a map".to_owned(),
        };
        self.error(field.node.line, &*field.path, found, expected);
    }

    pub(super) fn missing(&mut self, section: &Section, key: &str, expected: impl Into<String>) {
        self.error(section.line, section.path_of(key), "nothing", expected);
    }

    /// A map with these keys only, each at most once.
    pub(super) fn section(&mut self, field: Field<'a>, keys: &[&str]) -> Option<Section<'a>> {
        let Value::Map(entries) = &field.node.value else {
            self.mismatch(&field, format!("a map with the keys {}", keys.join(", ")));
            return None;
        };
        let section = Section {
            path: field.path,
            line: field.node.line,
            entries,
        };
        let mut first_lines: HashMap<&str, usize> = HashMap::new();
        for entry in entries {
            let path = section.path_of(&entry.key);
            if !keys.contains(&entry.key.as_str()) {
                let expected = match nearest(&entry.key, keys) {
                    Some(key) => format!("\"{key}\""),
                    None => format!("one of {}", keys.join(", ")),
                };
                self.error(entry.line, path, "an unknown key", expected);
                continue;
            }
            match first_lines.entry(&entry.key) {
                MapEntry::Occupied(first) => {
                    let found = format!("the key a second time, after line {}", first.get());
                    self.error(entry.line, path, found, "it once");
                }
                MapEntry::Vacant(free) => {
                    free.insert(entry.line);
                }
            }
        }
        Some(section)
    }

    /// A scalar that `parse` understands.
    pub(super) fn value<T>(
        &mut self,
        field: &Field,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let value = match &field.node.value {
            Value::Scalar(text) => parse(text),
            _ => None,
        };
        if value.is_none() {
            self.mismatch(field, expected);
        }
        value
    }

    pub(super) fn required<T>(
        &mut self,
        section: &Section<'a>,
        key: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        match section.get(key) {
            Some(field) => self.value(&field, expected, parse),
            None => {
                self.missing(section, key, expected);
                None
            }
        }
    }

    pub(super) fn optional<T>(
        &mut self,
        section: &Section<'a>,
        key: &str,
        default: T,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        match section.get(key) {
            Some(field) => self.value(&field, expected, parse),
            None => Some(default),
        }
    }

    pub(super) fn unique<K: std::hash::Hash + Eq>(
        &mut self,
        seen: &mut HashMap<K, usize>,
        key: K,
        field: &Field,
    ) {
        match seen.entry(key) {
            MapEntry::Occupied(first) => {
                let expected = format!("one that is not taken (see line {})", first.get());
                self.mismatch(field, expected);
            }
            MapEntry::Vacant(free) => {
                free.insert(field.node.line);
            }
        }
    }
}

/// The key that was meant, if one is near enough for a slip of the hand.
fn nearest<'k>(found: &str, keys: &[&'k str]) -> Option<&'k str> {
    keys.iter()
        .map(|key| (strsim::osa_distance(found, key), *key))
        .min()
        .filter(|(distance, key)| *distance <= 1 + key.len() / 4)
        .map(|(_, key)| key)
}
