//! The ways to multiply that were fastest at a start, kept on disk: the same file gives the same choices and the same bits,
//! and a start that reads it has nothing to measure.
//!
//! Text, so that people can read, compare and pass it on: what it holds for (GPU, library, model), a line for each product
//! of each rank, and a hash of all that. A file of another GPU, library, model or format is not taken, nor a damaged one.
//! What a start measures is added to what the file has; a file that was asked for by name is only read, and has to have
//! everything.

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Write as _},
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use sha2::{Digest, Sha256};

use super::{
    blas::{Out, Shape},
    cache,
};

/// How matrix products are computed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// By the fastest way: what an earlier start on this machine found is taken, the rest is measured and kept.
    #[default]
    Kept,
    /// By the fastest way, measured at this start; nothing is read or kept.
    Measured,
    /// As this file says. What it has not got is an error.
    Pinned(PathBuf),
    /// By our own kernel where it can, by the library's first way elsewhere, so that two starts give the same bits.
    First,
}

/// Why a file of choices is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// The system's word.
    #[error("{0}")]
    Read(String),
    /// Another program's file, or another version's.
    #[error("its first line is not {FORMAT:?}")]
    Format,
    /// Torn, or changed by hand.
    #[error("its last line is not the hash of the others: it is damaged")]
    Damaged,
    /// It says something else of what it is for.
    #[error("it is for {there:?}, and here is {here:?}")]
    Foreign {
        /// A line of the file.
        there: String,
        /// As it would be here.
        here: String,
    },
    /// A line that is no choice.
    #[error("its line {0} is no choice of this version")]
    Line(usize),
}

/// Why matrix products cannot be computed as a given file says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChoicesError {
    /// The file is not of use here.
    #[error("the product choices of {} cannot be taken: {why}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Why.
        why: Unfit,
    },
    /// The file has no line for a product.
    #[error(
        "{} has no choice for {product}; take one that a start with the same model, ranks and step size has kept, or \
         leave --product-choices out", path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
        /// The product, as a file names it.
        product: String,
    },
    /// The library cannot compute a product that way.
    #[error("{}: the library refuses its choice for {product} ({why})", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// The product, as a file names it.
        product: String,
        /// The library's word.
        why: String,
    },
}

/// The first line. A change of what follows is another version.
const FORMAT: &str = "swallow-product-choices 1";
/// Numbers that the library describes a way with.
const LIBRARY_NUMBERS: usize = 8;

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// By our own kernel.
    Own,
    /// By the library, as these bits say, which the library lets be stored for the same version of it.
    Library([u64; LIBRARY_NUMBERS]),
}

/// What choices hold for: a line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity(pub(super) Vec<String>);

impl Identity {
    /// The name of its file among others.
    pub(super) fn file_name(&self) -> String {
        let lines: Vec<&str> = [FORMAT]
            .into_iter()
            .chain(self.0.iter().map(String::as_str))
            .collect();
        format!("products-{}.txt", cache::short_hash(&lines))
    }
}

/// A product of a rank. It is written as it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Product {
    rank: usize,
    shape: Shape,
}

impl Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { m, n, k, out } = self.shape;
        let out = match out {
            Out::Bf16 => "bf16",
            Out::F32 => "fp32",
        };
        write!(f, "rank={} rows={m} outs={n} ins={k} numbers={out}", self.rank)
    }
}

/// Choices of all ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Choices(BTreeMap<Product, Way>);

impl Choices {
    /// Reads a whole file.
    fn parse(text: &str, identity: &Identity) -> Result<Self, Unfit> {
        if text.lines().next() != Some(FORMAT) {
            return Err(Unfit::Format);
        }
        let end = text.trim_end_matches('\n').rfind('\n').map_or(0, |at| at + 1);
        let (body, last) = text.split_at(end);
        if last != hash_line(body) {
            return Err(Unfit::Damaged);
        }
        let mut lines = body.lines().enumerate().skip(1);
        for here in &identity.0 {
            let there = lines.next().map_or("nothing", |(_, line)| line);
            if there != here {
                return Err(Unfit::Foreign {
                    there: there.to_owned(),
                    here: here.clone(),
                });
            }
        }
        let mut choices = BTreeMap::new();
        for (n, line) in lines {
            let (product, way) = choice(line).ok_or(Unfit::Line(n + 1))?;
            if choices.insert(product, way).is_some() {
                return Err(Unfit::Line(n + 1));
            }
        }
        Ok(Self(choices))
    }

    /// A whole file.
    fn render(&self, identity: &Identity) -> String {
        let mut text = format!("{FORMAT}\n");
        for line in &identity.0 {
            text += line;
            text.push('\n');
        }
        for (product, way) in &self.0 {
            // Writing to a String does not fail.
            let _ = match way {
                Way::Own => writeln!(text, "{product} way=own"),
                Way::Library(numbers) => {
                    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
                    writeln!(text, "{product} way=library:{}", cache::hex(&bytes))
                }
            };
        }
        let last = hash_line(&text);
        text + &last
    }

    fn read(path: &Path, identity: &Identity) -> Result<Self, Unfit> {
        let text = fs::read_to_string(path).map_err(|error| Unfit::Read(error.to_string()))?;
        Self::parse(&text, identity)
    }
}

fn hash_line(body: &str) -> String {
    format!("sha256={}\n", cache::hex(&Sha256::digest(body)))
}

/// A line of a file.
fn choice(line: &str) -> Option<(Product, Way)> {
    let mut words = line.split(' ');
    let mut value = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=');
    let number = |text: &str| text.parse::<usize>().ok();
    let product = Product {
        rank: number(value("rank")?)?,
        shape: Shape {
            m: number(value("rows")?)?,
            n: number(value("outs")?)?,
            k: number(value("ins")?)?,
            out: match value("numbers")? {
                "bf16" => Out::Bf16,
                "fp32" => Out::F32,
                _ => return None,
            },
        },
    };
    let way = match value("way")? {
        "own" => Way::Own,
        way => Way::Library(library(way.strip_prefix("library:")?)?),
    };
    words.next().is_none().then_some((product, way))
}

fn library(digits: &str) -> Option<[u64; LIBRARY_NUMBERS]> {
    const DIGITS: usize = 16;
    if digits.len() != LIBRARY_NUMBERS * DIGITS || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut numbers = [0; LIBRARY_NUMBERS];
    for (n, number) in numbers.iter_mut().enumerate() {
        *number = u64::from_str_radix(&digits[n * DIGITS..(n + 1) * DIGITS], 16).ok()?;
    }
    Some(numbers)
}

/// One rank's choices: those it was given, and those it has found.
pub(super) struct Book {
    products: Products,
    rank: usize,
    identity: Identity,
    /// Where they are kept, if they are.
    folder: Option<PathBuf>,
    known: Choices,
    found: Choices,
    /// Known ways that the library would not go.
    n_refused: usize,
}

impl Book {
    /// For products that nobody waits for often: always the first way.
    pub(super) fn first() -> Self {
        Self {
            products: Products::First,
            rank: 0,
            identity: Identity(Vec::new()),
            folder: None,
            known: Choices::default(),
            found: Choices::default(),
            n_refused: 0,
        }
    }

    /// What is known for a rank; `folder` has the files of earlier starts. `is_ours` says which shapes our own kernel has.
    ///
    /// # Errors
    /// A file that was asked for by name cannot be taken.
    pub(super) fn open(
        products: &Products,
        identity: Identity,
        rank: usize,
        folder: Option<PathBuf>,
        is_ours: impl Fn(&Shape) -> bool,
    ) -> Result<Self, ChoicesError> {
        let read = |path: &Path| -> Result<Choices, Unfit> {
            let choices = Choices::read(path, &identity)?;
            let not_ours = |(product, way): (&Product, &Way)| *way == Way::Own && !is_ours(&product.shape);
            match choices.0.iter().position(not_ours) {
                Some(at) => Err(Unfit::Line(2 + identity.0.len() + at)),
                None => Ok(choices),
            }
        };
        let kept = folder.as_ref().map(|folder| folder.join(identity.file_name()));
        let known = match (products, kept) {
            (Products::Pinned(path), _) => read(path).map_err(|why| ChoicesError::Unfit {
                path: path.clone(),
                why,
            })?,
            (Products::Kept, Some(path)) if path.exists() => read(&path).unwrap_or_else(|why| {
                // Once for all ranks, which see the same file.
                if rank == 0 {
                    tracing::warn!("{}: not taken, products are measured anew: {why}", path.display());
                }
                Choices::default()
            }),
            _ => Choices::default(),
        };
        Ok(Self {
            products: products.clone(),
            rank,
            identity,
            folder,
            known,
            found: Choices::default(),
            n_refused: 0,
        })
    }

    /// Whether unknown products are to be measured.
    pub(super) fn measures(&self) -> bool {
        matches!(self.products, Products::Kept | Products::Measured)
    }

    /// How a product is to be computed; `None` if that is not known.
    ///
    /// # Errors
    /// It must be known, and is not.
    pub(super) fn way(&self, shape: Shape) -> Result<Option<Way>, ChoicesError> {
        let product = self.product(shape);
        match (self.known.0.get(&product), &self.products) {
            (Some(way), _) => Ok(Some(*way)),
            (None, Products::Pinned(path)) => Err(ChoicesError::Missing {
                path: path.clone(),
                product: product.to_string(),
            }),
            (None, _) => Ok(None),
        }
    }

    /// The library refuses the way that is known for a product: it is unknown from now on.
    ///
    /// # Errors
    /// It was asked for by name.
    pub(super) fn refused(&mut self, shape: Shape, why: impl Display) -> Result<(), ChoicesError> {
        let product = self.product(shape);
        if let Products::Pinned(path) = &self.products {
            return Err(ChoicesError::Refused {
                path: path.clone(),
                product: product.to_string(),
                why: why.to_string(),
            });
        }
        // The first stands for what may be all of them.
        if self.n_refused == 0 {
            tracing::warn!("the library refuses the kept choice for {product}, it is measured anew: {why}");
        }
        self.n_refused += 1;
        self.known.0.remove(&product);
        Ok(())
    }

    /// Notes what was found to be the fastest.
    pub(super) fn found(&mut self, shape: Shape, way: Way) {
        self.found.0.insert(self.product(shape), way);
    }

    /// How many choices are known from a file, how many of those the library refused, and how many were found at this start.
    pub(super) fn counts(&self) -> [usize; 3] {
        let known = self.known.0.keys().filter(|product| product.rank == self.rank);
        [known.count(), self.n_refused, self.found.0.len()]
    }

    /// Adds what was found to the file for the next start. Where that cannot be written, it is told once, and the next
    /// start measures again.
    pub(super) fn keep(&self) {
        // Ranks come here together, and each adds its own.
        static TOLD: Mutex<bool> = Mutex::new(false);
        if self.products != Products::Kept || self.found.0.is_empty() {
            return;
        }
        let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(why) = self.add_to_file()
            && !std::mem::replace(&mut *told, true)
        {
            tracing::warn!("the ways to multiply are not kept for the next start: {why}");
        }
    }

    /// In words, why not.
    fn add_to_file(&self) -> Result<(), String> {
        let Some(folder) = &self.folder else {
            return Err("there is no folder for them; set SWALLOW_CACHE".into());
        };
        let name = self.identity.file_name();
        let mut all = Choices::read(&folder.join(&name), &self.identity).unwrap_or_default();
        all.0.extend(&self.found.0);
        cache::put(folder, &name, all.render(&self.identity).as_bytes())
            .map_err(|error| format!("{}: {error}", folder.display()))
    }

    fn product(&self, shape: Shape) -> Product {
        Product {
            rank: self.rank,
            shape,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(gpu: &str) -> Identity {
        Identity(vec![format!("gpu {gpu}"), "cublaslt 130000".into()])
    }

    fn shape(m: usize) -> Shape {
        Shape {
            m,
            n: 4096,
            k: 2048,
            out: if m.is_multiple_of(2) { Out::Bf16 } else { Out::F32 },
        }
    }

    fn library(seed: u64) -> Way {
        Way::Library(std::array::from_fn(|n| seed << 56 | n as u64))
    }

    fn open(products: &Products, rank: usize, folder: &Path) -> Result<Book, ChoicesError> {
        Book::open(products, identity("A"), rank, Some(folder.to_owned()), |shape| {
            shape.m <= 8
        })
    }

    /// A file with products of two ranks, as two starts made it.
    fn kept(folder: &Path) -> PathBuf {
        for (rank, choices) in [
            (0, [(1, Way::Own), (64, library(1))]),
            (1, [(1, library(2)), (64, library(3))]),
        ] {
            let mut book = open(&Products::Kept, rank, folder).expect("nothing is asked for by name");
            choices.into_iter().for_each(|(m, way)| book.found(shape(m), way));
            book.keep();
        }
        folder.join(identity("A").file_name())
    }

    #[test]
    fn what_ranks_found_is_there_at_the_next_start() {
        let folder = tempfile::tempdir().expect("a folder for this test");
        let path = kept(folder.path());
        let first = fs::read_to_string(&path).expect("kept");
        let mut book = open(&Products::Kept, 1, folder.path()).expect("sound");
        assert_eq!(book.way(shape(1)), Ok(Some(library(2))));
        assert_eq!(book.way(shape(64)), Ok(Some(library(3))));
        assert_eq!((book.way(shape(65)), book.counts()), (Ok(None), [2, 0, 0]));
        book.keep();
        assert_eq!(
            fs::read_to_string(&path).expect("kept"),
            first,
            "nothing new: the same file"
        );
        // A larger step adds its products; a way that the library has refused since gives place to another.
        book.refused(shape(64), "not supported")
            .expect("not asked for by name");
        assert_eq!((book.way(shape(64)), book.counts()), (Ok(None), [1, 1, 0]));
        book.found(shape(64), library(9));
        book.found(shape(65), library(4));
        book.keep();
        let book = open(&Products::Kept, 1, folder.path()).expect("sound");
        assert_eq!(book.way(shape(1)), Ok(Some(library(2))));
        assert_eq!(book.way(shape(64)), Ok(Some(library(9))));
        assert_eq!(book.way(shape(65)), Ok(Some(library(4))));
        let other = open(&Products::Kept, 0, folder.path()).expect("sound");
        assert_eq!(
            other.way(shape(1)),
            Ok(Some(Way::Own)),
            "the other rank's are as they were"
        );
        assert_eq!(other.way(shape(64)), Ok(Some(library(1))));
    }

    #[test]
    fn a_damaged_or_foreign_file_is_not_taken_and_is_replaced() {
        let folder = tempfile::tempdir().expect("a folder for this test");
        let path = kept(folder.path());
        let good = fs::read_to_string(&path).expect("kept");
        let parse = |text: &str| Choices::parse(text, &identity("A"));
        assert_eq!(parse(&good).map(|choices| choices.0.len()), Ok(4));
        assert_eq!(
            parse(&good).map(|choices| choices.render(&identity("A"))),
            Ok(good.clone())
        );
        let signed = |lines: &str| format!("{lines}{}", hash_line(lines));
        let body = &good[..good.rfind("sha256").expect("the last line")];
        assert_eq!(parse(""), Err(Unfit::Format));
        assert_eq!(parse(&good.replace("choices 1", "choices 2")), Err(Unfit::Format));
        let damaged = [
            &good[..good.len() - 1],
            &good[..good.len() / 2],
            body,
            &good.replace("rows=64", "rows=32"),
        ];
        for text in damaged {
            assert_eq!(parse(text), Err(Unfit::Damaged), "{text}");
        }
        let foreign = Choices::parse(&good, &identity("B"));
        assert_eq!(
            foreign.map_err(|why| why.to_string()),
            Err(r#"it is for "gpu A", and here is "gpu B""#.to_owned())
        );
        assert!(matches!(
            parse(&signed(&format!("{FORMAT}\ngpu A\n"))),
            Err(Unfit::Foreign { .. })
        ));
        let line = "rank=0 rows=1 outs=2 ins=3 numbers=bf16 way=own";
        assert_eq!(
            parse(&signed(&format!("{body}{line}\n"))).map(|choices| choices.0.len()),
            Ok(5)
        );
        for bad in [
            "",
            "rank=0 rows=1 outs=2 ins=3 numbers=fp16 way=own",
            "rank=0 rows=x outs=2 ins=3 numbers=bf16 way=own",
            "rank=0 rows=1 outs=2 ins=3 numbers=bf16 way=library:12",
            "rank=0 rows=1 outs=2 ins=3 numbers=bf16 way=own and=more",
            "rank=0 rows=1 outs=2 ins=3 numbers=bf16",
        ] {
            assert_eq!(
                parse(&signed(&format!("{body}{bad}\n"))),
                Err(Unfit::Line(8)),
                "{bad:?}"
            );
        }
        assert_eq!(
            parse(&signed(&format!("{body}{line}\n{line}\n"))),
            Err(Unfit::Line(9)),
            "twice"
        );

        fs::write(&path, "no choices").expect("writable");
        let mut book = open(&Products::Kept, 0, folder.path()).expect("not asked for by name");
        assert_eq!(book.way(shape(1)), Ok(None));
        book.found(shape(1), library(5));
        book.keep();
        let book = open(&Products::Kept, 0, folder.path()).expect("sound");
        assert_eq!(book.way(shape(1)), Ok(Some(library(5))));
    }

    #[test]
    fn a_file_that_is_asked_for_by_name_must_have_everything() {
        let folder = tempfile::tempdir().expect("a folder for this test");
        let elsewhere = tempfile::tempdir().expect("a folder for this test");
        let pinned = Products::Pinned(kept(folder.path()));
        let mut book = open(&pinned, 0, elsewhere.path()).expect("sound");
        assert!(!book.measures());
        assert_eq!(book.way(shape(64)), Ok(Some(library(1))));
        let missing = book.way(shape(2)).expect_err("not in the file").to_string();
        assert!(
            missing.contains("no choice for rank=0 rows=2 outs=4096 ins=2048 numbers=bf16"),
            "{missing}"
        );
        assert!(matches!(
            book.refused(shape(64), "no"),
            Err(ChoicesError::Refused { .. })
        ));
        book.found(shape(2), library(1));
        book.keep();
        assert_eq!(
            fs::read_dir(elsewhere.path()).expect("there").count(),
            0,
            "nothing is kept"
        );
        let gone = Products::Pinned(elsewhere.path().join("gone"));
        let error = open(&gone, 0, folder.path()).map(drop).expect_err("no such file");
        assert!(
            matches!(
                error,
                ChoicesError::Unfit {
                    why: Unfit::Read(_),
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn our_own_kernel_is_not_asked_for_what_it_has_not_got() {
        let folder = tempfile::tempdir().expect("a folder for this test");
        let mut book = open(&Products::Kept, 0, folder.path()).expect("sound");
        book.found(shape(2), library(1));
        book.found(shape(64), Way::Own);
        book.keep();
        let pinned = Products::Pinned(folder.path().join(identity("A").file_name()));
        let error = open(&pinned, 0, folder.path()).map(drop);
        assert!(
            matches!(
                error,
                Err(ChoicesError::Unfit {
                    why: Unfit::Line(5),
                    ..
                })
            ),
            "{error:?}"
        );
        let book = open(&Products::Kept, 0, folder.path()).expect("not asked for by name");
        assert_eq!(book.way(shape(2)), Ok(None));
    }

    #[test]
    fn a_start_that_only_measures_reads_and_keeps_nothing() {
        let folder = tempfile::tempdir().expect("a folder for this test");
        let path = kept(folder.path());
        let before = fs::read(&path).expect("kept");
        for (products, measures) in [(Products::Measured, true), (Products::First, false)] {
            let mut book = open(&products, 0, folder.path()).expect("sound");
            assert_eq!((book.way(shape(1)), book.measures()), (Ok(None), measures));
            book.found(shape(1), library(7));
            book.keep();
            assert_eq!(fs::read(&path).expect("kept"), before);
        }
    }

    /// A folder that cannot be written is no reason not to start. A file stands where the folder should be: that holds
    /// for root too.
    #[test]
    fn what_cannot_be_kept_is_measured_again() {
        let root = tempfile::tempdir().expect("a folder for this test");
        let folder = root.path().join("products");
        fs::write(&folder, "not a folder").expect("writable");
        let mut book = open(&Products::Kept, 0, &folder).expect("not asked for by name");
        book.found(shape(1), library(7));
        book.keep();
        assert_eq!(fs::read(&folder).expect("there"), b"not a folder");
        let why = book.add_to_file().expect_err("not a folder");
        assert!(why.starts_with(&folder.display().to_string()), "{why}");
        book.folder = None;
        assert!(book.add_to_file().is_err_and(|why| why.contains("SWALLOW_CACHE")));
    }
}
