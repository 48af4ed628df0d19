package keyturn_test

import (
	"encoding/json"
	"fmt"
	"go/format"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

// snippets are the README's blocks of Go.
func snippets(t *testing.T) []string {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	require(t, err)
	var found []string
	for _, block := range regexp.MustCompile("(?s)```go\n(.*?)```").FindAllSubmatch(readme, -1) {
		found = append(found, string(block[1]))
	}
	return found
}

// build compiles a program in this module, without leaving a file in it.
func build(t *testing.T, source string) string {
	t.Helper()
	directory := t.TempDir()
	require(t, os.WriteFile(filepath.Join(directory, "main.go"), []byte(source), 0o600))
	program := filepath.Join(directory, "program")
	if output, err := exec.Command("go", "build", "-o", program, filepath.Join(directory, "main.go")).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	return program
}

// around is what the README's gateway leaves to its reader.
const around = `package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"

	"github.com/keyturn/keyturn/clients/go"
)

type Prompt struct{ Model string }

type Completion struct {
	Usage struct {
		PromptTokens     int64 ` + "`json:\"prompt_tokens\"`" + `
		CompletionTokens int64 ` + "`json:\"completion_tokens\"`" + `
	}
}

func post(ctx context.Context, headers map[string]string, prompt Prompt) (*Completion, error) {
	body, err := json.Marshal(prompt)
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, "POST", os.Getenv("OPENAI_BASE_URL")+"/chat/completions", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for name, value := range headers {
		request.Header.Set(name, value)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	answer := new(Completion)
	return answer, json.NewDecoder(response.Body).Decode(answer)
}

func main() {
	client, err := keyturn.NewClient(keyturn.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	answer, err := chat(context.Background(), client, "u1", Prompt{Model: "gpt-4o"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(answer.Usage.CompletionTokens, "tokens")
}
`

func TestTheGatewayOfTheReadmeSignsWithWhoPaysAndRecords(t *testing.T) {
	program := build(t, around+snippets(t)[0])
	for user, each := range map[string]struct {
		answer *keyturnv1.DecideResponse
		signed string
	}{
		"with a key": {keyAnswer(), "Bearer " + secretText}, "with credits": {ticketAnswer(), "Bearer sk-platform"},
	} {
		s := serve(t, &sidecar{onDecide: scripted[keyturnv1.DecideRequest](func() *keyturnv1.DecideResponse { return each.answer })})
		provider := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			equal(t, user+": path", r.URL.Path, "/v1/chat/completions")
			equal(t, user+": signed", r.Header.Get("Authorization"), each.signed)
			_ = json.NewEncoder(w).Encode(map[string]any{"usage": map[string]int{"prompt_tokens": 3, "completion_tokens": 7}})
		}))
		run := exec.Command(program)
		run.Env = append(os.Environ(), "KEYTURN_ADDRESS="+s.target, "OPENAI_API_KEY=sk-platform", "OPENAI_BASE_URL="+provider.URL+"/v1")
		output, err := run.CombinedOutput()
		provider.Close()
		require(t, err)
		equal(t, user+": printed", string(output), "7 tokens\n")
		records := s.records()
		equal(t, user+": records", len(records), 1)
		equal(t, user+": outcome", records[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_SUCCESS)
		equal(t, user+": output tokens", records[0].GetUsage().GetOutputTokens(), 7)
	}
}

func TestTheReadmeIsFormatted(t *testing.T) {
	for i, snippet := range snippets(t) {
		formatted, err := format.Source([]byte(snippet))
		require(t, err)
		equal(t, fmt.Sprintf("snippet %d", i), snippet, string(formatted))
	}
}

func TestTheOtherSnippetsOfTheReadmeCompile(t *testing.T) {
	source := strings.Builder{}
	source.WriteString(`package main

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/keyturn/keyturn/clients/go"
)

var (
	_           = time.Second
	platformKey map[string]string
)

func main() {}
`)
	all := snippets(t)[1:]
	equal(t, "snippets", len(all), 5)
	for i, snippet := range all {
		// What each stands in: a function that returns an error, or a status with a text.
		returns, last := "error", "return nil"
		if strings.Contains(snippet, "http.Status") {
			returns, last = "(int, string)", `return 0, ""`
		}
		fmt.Fprintf(&source, `
func snippet%d(ctx context.Context, client *keyturn.Client, given *keyturn.Call, options keyturn.Options, request keyturn.DecideRequest) %s {
	call, response, errorCode := given, http.Response{}, ""
	headers, err := map[string]string{}, errors.New("")
	_, _, _, _, _ = call, response, errorCode, headers, err
	{
		%s
		%s
		%s
	}
}
`, i, returns, snippet, used(snippet), last)
	}
	build(t, source.String())
}

// used names what a snippet declares and leaves to its reader.
func used(snippet string) string {
	for _, name := range []string{"recorded", "decision", "call"} {
		if strings.Contains(snippet, name+", err := ") {
			return "_, _ = " + name + ", err"
		}
	}
	return ""
}
