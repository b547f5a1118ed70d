//! The arguments of `swallow-worker fetch`, which brings a model's files into a folder.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, ValueEnum};

use super::Argv;

/// Where models live unless another endpoint is given.
pub const HUGGING_FACE: &str = "https://huggingface.co";

/// How progress is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ProgressFormat {
    /// For people, on stderr.
    #[default]
    Text,
    /// For programs: one JSON object a line, on stdout.
    Json,
}

/// What to fetch, from where, to where.
#[derive(Args, Clone, Debug, PartialEq)]
pub struct FetchArgs {
    /// Repository of the model at the endpoint
    #[arg(long, value_name = "ORG/NAME")]
    pub repo: String,
    /// Commit to fetch: 40 hexadecimal digits, so that every replica gets the same files
    #[arg(long, value_name = "COMMIT")]
    pub revision: String,
    /// Where the repository lives; a mirror's address may have a path
    #[arg(long, value_name = "URL", default_value = HUGGING_FACE)]
    pub endpoint: String,
    /// Folder that gets the files; created if it is not there
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// File that holds an access token, for gated and private repositories
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// PEM file with certificate authorities to trust besides the system's, for a mirror with a private one
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Progress as text on stderr, or as JSON lines on stdout
    #[arg(long, value_enum, default_value = "text")]
    pub progress: ProgressFormat,
    /// Address for /state, which tells the progress to whoever asks while the fetch runs
    #[arg(long, value_name = "ADDRESS")]
    pub http_listen: Option<SocketAddr>,
}

impl FetchArgs {
    /// The command line after the program's name; parsing it gives the same value back.
    pub fn argv(&self) -> Vec<String> {
        let mut argv = Argv(vec!["fetch".into()]);
        argv.flag("repo", &self.repo);
        argv.flag("revision", &self.revision);
        argv.flag("endpoint", &self.endpoint);
        argv.flag("out", self.out.display());
        argv.optional("token-file", self.token_file.as_ref().map(|path| path.display()));
        argv.optional("ca-file", self.ca_file.as_ref().map(|path| path.display()));
        argv.choice("progress", self.progress);
        argv.optional("http-listen", self.http_listen);
        argv.0
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    enum Cli {
        Fetch(FetchArgs),
    }

    fn parse(argv: Vec<String>) -> FetchArgs {
        let Cli::Fetch(args) = Cli::parse_from(std::iter::once("swallow-worker".to_string()).chain(argv));
        args
    }

    #[test]
    fn a_rendered_command_line_parses_back() {
        let minimal = parse(
            ["fetch", "--repo=a/b", "--revision=c", "--out=/m"]
                .map(String::from)
                .to_vec(),
        );
        assert_eq!(minimal.endpoint, HUGGING_FACE);
        assert_eq!(parse(minimal.argv()), minimal);
        let full = FetchArgs {
            endpoint: "https://mirror:8443/hf?x=日本 語".into(),
            out: "/cache/日本 語=x".into(),
            token_file: Some("/token".into()),
            ca_file: Some("/ca.pem".into()),
            progress: ProgressFormat::Json,
            http_listen: Some(([0, 0, 0, 0], 8080).into()),
            ..minimal
        };
        assert_eq!(parse(full.argv()), full);
    }
}
