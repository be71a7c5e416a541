//! The graph of a crate's modules, read from its sources.
//!
//! A module depends on another if code in it, tests aside, names something that lies there. At every level of the module tree the
//! modules that lie side by side are to form layers: no dependency leads back. A module and those inside it are one thing to
//! others, and may name each other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};

use proc_macro2::{Span, TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Expr, Item, ItemMod, ItemUse, Lit, Meta, UseTree};

/// A module by the names that lead to it; the crate's root has none.
type Name = Vec<String>;

/// Re-exports that are followed one after the other. More than there are in any chain of them.
const MOST_REEXPORTS: usize = 8;

/// A place in the sources.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    file: PathBuf,
    line: usize,
}

/// A path that code in a module names.
struct Mention {
    from: Name,
    segments: Vec<String>,
    place: Place,
}

/// What is known of a crate.
#[derive(Default)]
pub(crate) struct Modules {
    names: BTreeSet<Name>,
    /// What a module has imported, by the name that it has there.
    imports: BTreeMap<(Name, String), Vec<String>>,
    mentions: Vec<Mention>,
}

/// A circle of modules that lie side by side: each depends on the next, the last on the first.
#[derive(Debug)]
pub(crate) struct Circle {
    /// The module that they lie in.
    pub(crate) level: String,
    /// Each module, the one that it depends on and where it says so.
    pub(crate) edges: Vec<(String, String, Place)>,
}

impl fmt::Display for Circle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "in crate{}{}:", if self.level.is_empty() { "" } else { "::" }, self.level)?;
        for (from, to, place) in &self.edges {
            write!(f, "\n    {from} -> {to} at {}:{}", place.file.display(), place.line)?;
        }
        Ok(())
    }
}

impl Modules {
    /// Reads a crate from its root file on. `read` has the text of a file, or `None` if there is none.
    ///
    /// # Panics
    /// If a file does not parse, or a module has no file.
    pub(crate) fn read(root: &Path, read: &dyn Fn(&Path) -> Option<String>) -> Self {
        let mut modules = Self::default();
        let folder = root.parent().expect("a root file is in a folder").to_owned();
        let text = read(root).unwrap_or_else(|| panic!("{} can't be read", root.display()));
        modules.file(root, &text, &folder, &Name::new(), read);
        modules
    }

    /// How many modules there are.
    pub(crate) fn count(&self) -> usize {
        self.names.len()
    }

    /// One circle for each set of modules that depend on each other.
    pub(crate) fn circles(&self) -> Vec<Circle> {
        let mut levels: BTreeMap<&[String], BTreeMap<&str, BTreeMap<&str, &Place>>> = BTreeMap::new();
        let reached: Vec<_> = self.mentions.iter().flat_map(|mention| self.reached(mention)).collect();
        for (from, to, place) in &reached {
            let level = from.iter().zip(to).take_while(|(from, to)| from == to).count();
            if let (Some(a), Some(b)) = (from.get(level), to.get(level)) {
                let edges = levels.entry(&from[..level]).or_default().entry(a).or_default();
                let place = *place;
                edges.entry(b).and_modify(|first| *first = place.min(first)).or_insert(place);
            }
        }
        levels.iter().flat_map(|(level, graph)| circles_of(level, graph)).collect()
    }

    /// The modules that a mention leads through: those that re-export what it names, and the one that has it.
    fn reached<'a>(&self, mention: &'a Mention) -> Vec<(&'a Name, Name, &'a Place)> {
        let mut found = Vec::new();
        let mut segments = mention.segments.clone();
        for _ in 0..MOST_REEXPORTS {
            let depth = (0..segments.len()).take_while(|&end| self.names.contains(&segments[..=end])).count();
            let (module, rest) = segments.split_at(depth);
            found.push((&mention.from, module.to_vec(), &mention.place));
            // A module's own imports were mentioned where they are; those that others see through it were not.
            let Some(import) = rest.first().and_then(|item| self.imports.get(&(module.to_vec(), item.clone()))) else {
                break;
            };
            segments = [import, &rest[1..]].concat();
        }
        found
    }

    fn file(&mut self, path: &Path, text: &str, folder: &Path, module: &Name, read: &dyn Fn(&Path) -> Option<String>) {
        let file = syn::parse_file(text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        self.names.insert(module.clone());
        let mut reader =
            Reader { modules: self, path, folder: folder.to_owned(), module: module.clone(), read, inline: false };
        file.items.iter().for_each(|item| reader.visit_item(item));
    }
}

/// The circles of one level.
fn circles_of<'a>(level: &[String], graph: &BTreeMap<&'a str, BTreeMap<&'a str, &Place>>) -> Vec<Circle> {
    let mut seen = BTreeSet::<&str>::new();
    let mut circles = Vec::new();
    for &start in graph.keys() {
        let Some(circle) = shortest_back(start, graph).filter(|_| !seen.contains(start)) else { continue };
        // All that are in this knot, so that it is told of once.
        seen.extend(graph.keys().filter(|&&other| leads(start, other, graph) && leads(other, start, graph)));
        let next = circle.iter().skip(1).chain(circle.first());
        let edge = |(from, to): (&&str, &&str)| ((*from).to_owned(), (*to).to_owned(), graph[from][to].clone());
        circles.push(Circle { level: level.join("::"), edges: circle.iter().zip(next).map(edge).collect() });
    }
    circles
}

fn leads(from: &str, to: &str, graph: &BTreeMap<&str, BTreeMap<&str, &Place>>) -> bool {
    way(from, to, graph).is_some()
}

/// The shortest way from a module back to itself.
fn shortest_back<'a>(start: &'a str, graph: &BTreeMap<&'a str, BTreeMap<&'a str, &Place>>) -> Option<Vec<&'a str>> {
    way(start, start, graph)
}

/// The shortest way from one to the other, which is left out.
fn way<'a>(from: &'a str, to: &str, graph: &BTreeMap<&'a str, BTreeMap<&'a str, &Place>>) -> Option<Vec<&'a str>> {
    let mut open = VecDeque::from([vec![from]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = open.pop_front() {
        for &next in graph.get(way[way.len() - 1]).into_iter().flat_map(BTreeMap::keys) {
            if next == to {
                return Some(way);
            }
            if seen.insert(next) {
                open.push_back([&way[..], &[next]].concat());
            }
        }
    }
    None
}

/// Reads the items of one module.
struct Reader<'a> {
    modules: &'a mut Modules,
    path: &'a Path,
    /// Where the files of its child modules are.
    folder: PathBuf,
    module: Name,
    read: &'a dyn Fn(&Path) -> Option<String>,
    /// Whether the module stands inside another one's file.
    inline: bool,
}

impl Reader<'_> {
    fn mention(&mut self, segments: &[String], span: Span) {
        if let Some(segments) = absolute(&self.module, segments) {
            let place = Place { file: self.path.to_owned(), line: span.start().line };
            self.modules.mentions.push(Mention { from: self.module.clone(), segments, place });
        }
    }

    fn import(&mut self, before: &[String], tree: &UseTree) {
        match tree {
            UseTree::Path(path) => self.import(&[before, &[path.ident.to_string()]].concat(), &path.tree),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(before, tree)),
            UseTree::Glob(glob) => self.mention(before, glob.star_token.spans[0]),
            UseTree::Name(name) => self.import_as(before, &name.ident, &name.ident),
            UseTree::Rename(rename) => self.import_as(before, &rename.ident, &rename.rename),
        }
    }

    fn import_as(&mut self, before: &[String], item: &syn::Ident, name: &syn::Ident) {
        // `a::{self}` is `a`.
        let path = if item == "self" { before.to_vec() } else { [before, &[item.to_string()]].concat() };
        let name = if name == "self" { before.last().cloned().unwrap_or_default() } else { name.to_string() };
        let target = absolute(&self.module, &path).or_else(|| {
            // What starts with the name of a child module is relative.
            let child = [&self.module[..], path.get(..1)?].concat();
            self.modules.names.contains(&child).then(|| [&self.module[..], &path].concat())
        });
        if let Some(target) = target {
            self.modules.imports.insert((self.module.clone(), name), target);
        }
        self.mention(&path, item.span());
    }

    fn submodule(&mut self, item: &ItemMod) {
        let name = item.ident.to_string();
        let module = [&self.module[..], std::slice::from_ref(&name)].concat();
        self.modules.names.insert(module.clone());
        if let Some((_, items)) = &item.content {
            let folder = self.folder.join(&name);
            let (path, read) = (self.path, self.read);
            let mut reader = Reader { modules: self.modules, path, folder, module, read, inline: true };
            return items.iter().for_each(|item| reader.visit_item(item));
        }
        let (path, folder) = match path_attribute(&item.attrs) {
            Some(path) if self.inline => self.with_folder(&self.folder.join(path)),
            Some(path) => self.with_folder(&self.path.parent().expect("a file is in a folder").join(path)),
            None => {
                let flat = self.folder.join(format!("{name}.rs"));
                let path = if (self.read)(&flat).is_some() { flat } else { self.folder.join(&name).join("mod.rs") };
                (path, self.folder.join(&name))
            }
        };
        let text = (self.read)(&path).unwrap_or_else(|| panic!("module {module:?} has no file {}", path.display()));
        self.modules.file(&path, &text, &folder, &module, self.read);
    }

    /// A file that is named by an attribute has its modules beside it.
    fn with_folder(&self, path: &Path) -> (PathBuf, PathBuf) {
        (path.to_owned(), path.parent().expect("a file is in a folder").to_owned())
    }

    /// Finds the paths in what a macro is given.
    fn tokens(&mut self, tokens: TokenStream) {
        let trees: Vec<TokenTree> = tokens.into_iter().collect();
        let mut index = 0;
        while index < trees.len() {
            match &trees[index] {
                TokenTree::Group(group) => self.tokens(group.stream()),
                TokenTree::Ident(first) => {
                    let mut segments = vec![first.to_string()];
                    while let [TokenTree::Punct(a), TokenTree::Punct(b), TokenTree::Ident(next), ..] =
                        &trees[index + 1..]
                        && (a.as_char(), b.as_char()) == (':', ':')
                    {
                        segments.push(next.to_string());
                        index += 3;
                    }
                    self.mention(&segments, first.span());
                }
                _ => {}
            }
            index += 1;
        }
    }
}

impl<'a> Visit<'a> for Reader<'_> {
    fn visit_item(&mut self, item: &'a Item) {
        if !is_for_tests(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'a syn::ImplItem) {
        let attributes = match item {
            syn::ImplItem::Fn(item) => &item.attrs,
            syn::ImplItem::Const(item) => &item.attrs,
            _ => return visit::visit_impl_item(self, item),
        };
        if !is_for_tests(attributes) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'a ItemMod) {
        self.submodule(item);
    }

    fn visit_item_use(&mut self, item: &'a ItemUse) {
        self.import(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        let segments: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.mention(&segments, path.segments[0].ident.span());
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, called: &'a syn::Macro) {
        self.tokens(called.tokens.clone());
        visit::visit_macro(self, called);
    }
}

/// A path from the crate's root on, if it says by itself where it starts.
fn absolute(module: &[String], path: &[String]) -> Option<Vec<String>> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "crate" => Some(rest.to_vec()),
        "self" => Some([module, rest].concat()),
        "super" => {
            let up = path.iter().take_while(|segment| *segment == "super").count();
            Some([&module[..module.len().checked_sub(up)?], &path[up..]].concat())
        }
        _ => None,
    }
}

/// Whether an item is built for tests or documentation only.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let Meta::List(list) = &attribute.meta else { return false };
        let condition = list.tokens.to_string();
        let words = || condition.split(|c: char| !c.is_alphanumeric() && c != '_');
        list.path.is_ident("cfg")
            && (["test", "doc"].contains(&condition.as_str())
                || condition.starts_with("all") && words().any(|word| word == "test") && !condition.contains("not"))
    })
}

fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(path) => Some(path.value()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a crate from texts that have names like those of files.
    fn read(files: &[(&str, &str)]) -> Modules {
        let files: BTreeMap<PathBuf, String> =
            files.iter().map(|&(path, text)| (path.into(), text.to_owned())).collect();
        Modules::read(Path::new("src/lib.rs"), &|path| files.get(path).cloned())
    }

    fn edges(modules: &Modules) -> Vec<String> {
        modules.circles().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_circle_is_found_with_the_lines_that_close_it() {
        let modules = read(&[
            ("src/lib.rs", "mod a; mod b; mod c;"),
            ("src/a.rs", "use crate::b::B;\npub struct A(B);"),
            ("src/b/mod.rs", "mod inner;\npub use inner::B;"),
            ("src/b/inner.rs", "pub struct B;\nfn f() -> usize {\n    super::super::c::size()\n}"),
            ("src/c.rs", "pub fn size() -> usize {\n\n    format!(\"{}\", size_of::<crate::a::A>()).len()\n}"),
        ]);
        assert_eq!(modules.count(), 5);
        let expected = "in crate:\n    a -> b at src/a.rs:1\n    b -> c at src/b/inner.rs:3\n    c -> a at src/c.rs:3";
        assert_eq!(edges(&modules), [expected]);
    }

    #[test]
    fn circles_are_found_at_every_level_and_through_what_is_exported_again() {
        let modules = read(&[
            ("src/lib.rs", "mod a { pub mod x; pub mod y; pub use x::X; }"),
            ("src/a/x.rs", "use crate::a::y::{self, Y};\npub struct X(Y);"),
            ("src/a/y.rs", "pub struct Y;\nimpl Y { fn f(_: &super::X) {} }"),
        ]);
        assert_eq!(edges(&modules), ["in crate::a:\n    x -> y at src/a/x.rs:1\n    y -> x at src/a/y.rs:2"]);
    }

    #[test]
    fn layers_parents_and_tests_close_no_circle() {
        let modules = read(&[
            ("src/lib.rs", "mod a; mod b;\npub struct Root(a::A);"),
            (
                "src/a.rs",
                "use super::Root;\nuse crate::b::{B, C as D};\npub struct A(B, D);\nmod inner { use super::A; }",
            ),
            (
                "src/b.rs",
                "pub struct B; pub struct C;\n#[cfg(test)]\nuse crate::a::A;\n#[cfg(test)]\nmod tests { use crate::a::A; }",
            ),
        ]);
        assert_eq!(modules.count(), 4);
        assert!(edges(&modules).is_empty(), "{:?}", edges(&modules));
    }
}
