//! YAML as a tree of scalars, lists and maps that know their lines.
//!
//! Scalars stay text: what a field means is the field's business, not YAML's guess. Anchors, aliases
//! and tags are refused, a config has no use for them and an alias can blow up a small file.

use saphyr_parser::{Event, Parser, ScalarStyle};

/// Deeper nesting than a config can need is refused.
const MAX_DEPTH: usize = 16;

/// A value and where it begins.
#[derive(Debug)]
pub(super) struct Node {
    /// Line, from 1.
    pub line: usize,
    pub value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    Scalar(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key, its line and its value. Keys may repeat: the reader refuses that with both lines.
#[derive(Debug)]
pub(super) struct Entry {
    pub key: String,
    pub line: usize,
    pub value: Node,
}

/// Why there is no tree: a line, and what was found there.
#[derive(Debug)]
pub(super) struct SyntaxError {
    pub line: usize,
    pub found: String,
}

/// A list or map that is still open.
enum Open {
    List(Vec<Node>),
    Map {
        entries: Vec<Entry>,
        key: Option<(String, usize)>,
    },
}

/// Reads one document. An empty text is a null.
pub(super) fn parse(text: &str) -> Result<Node, SyntaxError> {
    let mut open: Vec<(usize, Open)> = Vec::new();
    let mut root = None;
    let mut documents = 0;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| SyntaxError {
            line: error.marker().line(),
            found: error.info().to_owned(),
        })?;
        let line = span.start.line();
        let refuse = |found: &str| {
            Err(SyntaxError {
                line,
                found: found.to_owned(),
            })
        };
        let value = match event {
            Event::DocumentStart(_) => {
                documents += 1;
                if documents > 1 {
                    return refuse("a second document");
                }
                continue;
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => continue,
            Event::Alias(_) => return refuse("an alias"),
            Event::Scalar(_, _, anchor, _)
            | Event::SequenceStart(anchor, _)
            | Event::MappingStart(anchor, _)
                if anchor != 0 =>
            {
                return refuse("an anchor");
            }
            Event::Scalar(_, _, _, Some(_))
            | Event::SequenceStart(_, Some(_))
            | Event::MappingStart(_, Some(_)) => return refuse("a tag"),
            Event::SequenceStart(..) | Event::MappingStart(..) if open.len() == MAX_DEPTH => {
                return refuse("too many levels");
            }
            Event::SequenceStart(..) => {
                open.push((line, Open::List(Vec::new())));
                continue;
            }
            Event::MappingStart(..) => {
                let map = Open::Map {
                    entries: Vec::new(),
                    key: None,
                };
                open.push((line, map));
                continue;
            }
            Event::Scalar(text, style, ..) => Node {
                line,
                value: scalar(&text, style),
            },
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some((line, Open::List(items))) => Node {
                    line,
                    value: Value::List(items),
                },
                Some((line, Open::Map { entries, .. })) => Node {
                    line,
                    value: Value::Map(entries),
                },
                None => return refuse("an end without a beginning"),
            },
        };
        match open.last_mut() {
            None => root = Some(value),
            Some((_, Open::List(items))) => items.push(value),
            Some((_, Open::Map { entries, key })) => match key.take() {
                Some((key, line)) => entries.push(Entry { key, line, value }),
                None => match value.value {
                    Value::Scalar(text) => *key = Some((text, value.line)),
                    _ => {
                        return Err(SyntaxError {
                            line: value.line,
                            found: "a key that is not a word".into(),
                        });
                    }
                },
            },
        }
    }
    Ok(root.unwrap_or(Node {
        line: 1,
        value: Value::Null,
    }))
}

fn scalar(text: &str, style: ScalarStyle) -> Value {
    if style == ScalarStyle::Plain && matches!(text, "" | "~" | "null" | "Null" | "NULL") {
        Value::Null
    } else {
        Value::Scalar(text.to_owned())
    }
}
