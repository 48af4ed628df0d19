// A gateway for OpenAI's chat completions in one file, to begin from. It asks Keyturn who pays, signs the request with the
// user's own key or the platform's, and records what became of it.
//
// KEYTURN_ADDRESS is the sidecar, LISTEN where to listen (127.0.0.1:0 by default), OPENAI_API_KEY the platform's key, and
// OPENAI_BASE_URL where that is good.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/keyturn/keyturn/clients/go"
)

const (
	maxBody       = 32 << 20 // of a request; and of an answer that is not a stream
	maxLine       = 1 << 20  // of a stream that is looked into; longer ones only pass through
	maxKeys       = 3        // tried for one request
	answerTimeout = 60 * time.Second
	endpoint      = "/v1/chat/completions"
)

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	client, err := keyturn.NewClient(keyturn.Options{})
	if err != nil {
		return err
	}
	defer client.Close() // after the last request has ended: sends its record
	listener, err := net.Listen("tcp", cmp.Or(os.Getenv("LISTEN"), "127.0.0.1:0"))
	if err != nil {
		return err
	}
	g := newGateway(client, keyturn.NewSecret(os.Getenv("OPENAI_API_KEY")),
		cmp.Or(os.Getenv("OPENAI_BASE_URL"), "https://api.openai.com/v1"))
	server := &http.Server{Handler: g.handler(), ReadHeaderTimeout: 10 * time.Second}
	stopped, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	serving := make(chan error, 1)
	go func() { serving <- server.Serve(listener) }()
	fmt.Printf("listening on http://%s\n", listener.Addr())
	select {
	case err := <-serving:
		return err
	case <-stopped.Done():
	}
	grace, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	if server.Shutdown(grace) != nil {
		_ = server.Close() // hangs up on the streams that are left
	}
	g.running.Wait()
	return nil
}

type gateway struct {
	client   *keyturn.Client
	platform keyturn.Secret
	baseURL  string
	timeout  time.Duration
	upstream *http.Client
	running  sync.WaitGroup
}

func newGateway(client *keyturn.Client, platform keyturn.Secret, baseURL string) *gateway {
	return &gateway{
		client: client, platform: platform, baseURL: baseURL, timeout: answerTimeout,
		// A redirect would take the key along to somewhere else.
		upstream: &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	}
}

func (g *gateway) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("POST "+endpoint, func(w http.ResponseWriter, r *http.Request) {
		g.running.Add(1)
		defer g.running.Done()
		g.chat(w, r)
	})
	return mux
}

// chat serves one request.
func (g *gateway) chat(w http.ResponseWriter, r *http.Request) {
	// Whoever bears it: a place for your own authentication.
	scheme, user, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if user = strings.TrimSpace(user); !strings.EqualFold(scheme, "Bearer") || user == "" {
		refuse(w, http.StatusUnauthorized, "missing_token", "Give a bearer token.")
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		refuse(w, http.StatusRequestEntityTooLarge, "body_too_large", "The body could not be read, or is too large.")
		return
	}
	asked, body, err := parse(body)
	if err != nil {
		refuse(w, http.StatusBadRequest, "invalid_body", "The body is no chat completion request in JSON.")
		return
	}
	call, err := g.client.Request(r.Context(), asked.decide(user, len(body)))
	if err != nil {
		refuseFor(w, err)
		return
	}
	defer call.Close()
	for tried := 1; ; tried++ {
		answer, err := g.send(r, call, body)
		if err != nil {
			brokenOff(w, r, call, err)
			return
		}
		refusal := answer.refusal()
		if refusal == nil {
			answer.pass(w, r, call)
			return
		}
		if call.Key() == nil || tried == maxKeys || !refusesKey(refusal.Outcome) {
			_ = call.Failed(*refusal)
			answer.pass(w, r, call)
			return
		}
		if err := call.KeyRefused(r.Context(), *refusal); err != nil {
			if _, denied := errors.AsType[*keyturn.DeniedError](err); denied {
				answer.pass(w, r, call)
			} else {
				answer.close()
				refuseFor(w, err)
			}
			return
		}
		answer.close()
	}
}

// A completion is what the gateway has to know of a request.
type completion struct {
	Model               string `json:"model"`
	Stream              bool   `json:"stream"`
	MaxTokens           *int64 `json:"max_tokens"`
	MaxCompletionTokens *int64 `json:"max_completion_tokens"`
}

// parse reads a request, and returns the body to send: of a stream it asks for the usage, whatever the caller said.
func parse(body []byte) (completion, []byte, error) {
	var asked completion
	if err := json.Unmarshal(body, &asked); err != nil || !asked.Stream {
		return asked, body, err
	}
	var fields, streamOptions map[string]json.RawMessage
	if err := json.Unmarshal(body, &fields); err != nil {
		return asked, nil, err
	}
	if given, ok := fields["stream_options"]; ok {
		if err := json.Unmarshal(given, &streamOptions); err != nil {
			return asked, nil, err
		}
	}
	if streamOptions == nil {
		streamOptions = map[string]json.RawMessage{}
	}
	streamOptions["include_usage"] = json.RawMessage("true")
	fields["stream_options"], _ = json.Marshal(streamOptions)
	body, err := json.Marshal(fields)
	return asked, body, err
}

func (c completion) decide(user string, bytes int) keyturn.DecideRequest {
	request := keyturn.DecideRequest{UserID: user, Provider: "openai", Model: c.Model, ServiceType: "gateway"}
	if most := cmp.Or(c.MaxCompletionTokens, c.MaxTokens); most != nil {
		request.MaxOutputTokens = most
		request.InputTokens = new(int64(bytes / 4))
	}
	return request
}

// An answer is the provider's, with as much of its body read as was needed to know what to do.
type answer struct {
	*http.Response
	started time.Time
	body    []byte // all of it, unless it is a stream
	close   func()
}

func (a *answer) streams() bool {
	return a.ok() && strings.HasPrefix(a.Header.Get("Content-Type"), "text/event-stream")
}

func (a *answer) ok() bool { return 200 <= a.StatusCode && a.StatusCode < 300 }

var (
	errNeverSent = errors.New("the provider cannot be reached")
	errTimeout   = errors.New("the provider did not answer in time")
	errBroken    = errors.New("the provider broke off")
)

// send sends the body, signed by whoever pays, and returns the provider's answer; else one of the errors above.
func (g *gateway) send(r *http.Request, call *keyturn.Call, body []byte) (*answer, error) {
	base := g.baseURL
	if key := call.Key(); key != nil {
		base = key.BaseURL
	}
	headers, err := call.Headers(map[string]string{"Authorization": "Bearer " + g.platform.Reveal()})
	if err != nil {
		return nil, err
	}
	var connected atomic.Bool
	ctx, cancel := context.WithCancelCause(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { connected.Store(true) },
	}))
	timer := time.AfterFunc(g.timeout, func() { cancel(errTimeout) })
	a := &answer{started: time.Now(), close: func() { cancel(context.Canceled) }}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(base, "/")+"/chat/completions",
		bytes.NewReader(body))
	if err == nil {
		request.Header.Set("Content-Type", cmp.Or(r.Header.Get("Content-Type"), "application/json"))
		for name, value := range headers {
			request.Header.Set(name, value)
		}
		a.Response, err = g.upstream.Do(request)
	}
	if err == nil && !a.streams() {
		a.body, err = io.ReadAll(http.MaxBytesReader(nil, a.Body, maxBody))
		_ = a.Body.Close()
	}
	timer.Stop()
	if err == nil {
		return a, nil
	}
	// The error itself would print the URL.
	timedOut := errors.Is(context.Cause(ctx), errTimeout)
	a.close()
	switch {
	case timedOut:
		return nil, errTimeout
	case !connected.Load():
		return nil, errNeverSent
	}
	return nil, errBroken
}

// brokenOff records and answers a request that got no answer.
func brokenOff(w http.ResponseWriter, r *http.Request, call *keyturn.Call, err error) {
	status, outcome := http.StatusBadGateway, keyturn.OutcomeProviderError
	switch {
	case r.Context().Err() != nil: // the caller hung up
		_ = call.Failed(keyturn.Failure{Outcome: keyturn.OutcomeClientCancelled})
		return
	case errors.Is(err, errNeverSent):
		outcome = keyturn.OutcomeNeverSent
	case errors.Is(err, errTimeout):
		status, outcome = http.StatusGatewayTimeout, keyturn.OutcomeTimeout
	}
	_ = call.Failed(keyturn.Failure{Outcome: outcome, ErrorMessage: err.Error()})
	refuse(w, status, strings.ToLower(outcome.String()), "The request could not be completed: "+err.Error()+".")
}

// refusal is what a refused answer is recorded as; nil when the provider did not refuse.
func (a *answer) refusal() *keyturn.Failure {
	if a.ok() {
		return nil
	}
	var said struct {
		Error struct {
			Code    any    `json:"code"`
			Type    string `json:"type"`
			Message string `json:"message"`
		} `json:"error"`
	}
	_ = json.Unmarshal(a.body, &said) // what is no JSON says nothing
	errorCode, _ := said.Error.Code.(string)
	failure := &keyturn.Failure{
		Outcome:      keyturn.OutcomeOf(a.StatusCode, cmp.Or(errorCode, said.Error.Type)),
		HTTPStatus:   a.StatusCode,
		ErrorMessage: said.Error.Message,
	}
	if seconds, err := strconv.ParseFloat(a.Header.Get("Retry-After"), 64); err == nil && 0 <= seconds && seconds <= 86_400 {
		failure.RetryAfter = new(time.Duration(seconds * float64(time.Second)))
	}
	return failure
}

func refusesKey(outcome keyturn.Outcome) bool {
	switch outcome {
	case keyturn.OutcomeAuthRejected, keyturn.OutcomeRateLimited, keyturn.OutcomeProviderBilling:
		return true
	}
	return false
}

// pass gives the answer to the caller as it is, and notes what a good one says of itself.
func (a *answer) pass(w http.ResponseWriter, r *http.Request, call *keyturn.Call) {
	defer a.close()
	if kind := a.Header.Get("Content-Type"); kind != "" {
		w.Header().Set("Content-Type", kind)
	}
	if after := a.Header.Get("Retry-After"); after != "" {
		w.Header().Set("Retry-After", after)
	}
	if !a.ok() {
		w.WriteHeader(a.StatusCode)
		_, _ = w.Write(a.body)
		return
	}
	_ = call.Note(keyturn.Note{Endpoint: endpoint, ResponseTime: time.Since(a.started), HTTPStatus: a.StatusCode})
	if !a.streams() {
		note(call, a.body)
		_ = call.Succeeded()
		w.WriteHeader(a.StatusCode)
		_, _ = w.Write(a.body)
		return
	}
	w.WriteHeader(a.StatusCode)
	done, err := a.relay(w, call)
	switch {
	case done:
		_ = call.Succeeded()
	case r.Context().Err() != nil || err != nil && !errors.Is(err, errBroken):
		_ = call.Failed(keyturn.Failure{Outcome: keyturn.OutcomeClientCancelled}) // the caller hung up
	default:
		_ = call.Failed(keyturn.Failure{Outcome: keyturn.OutcomeProviderError, ErrorMessage: errBroken.Error()})
		panic(http.ErrAbortHandler) // so that the caller sees that the stream broke off
	}
}

// relay passes a stream on as it arrives. done: its end went by. The error is errBroken when the provider broke off, else
// that of the caller's connection.
func (a *answer) relay(w http.ResponseWriter, call *keyturn.Call) (done bool, err error) {
	defer a.Body.Close()
	flush := http.NewResponseController(w).Flush
	chunk, line := make([]byte, 32<<10), []byte(nil)
	for {
		read, broke := a.Body.Read(chunk)
		for _, part := range bytes.SplitAfter(chunk[:read], []byte("\n")) {
			if len(line) < maxLine {
				line = append(line, part...)
			}
			if !bytes.HasSuffix(part, []byte("\n")) && broke != io.EOF {
				continue // the rest of the line comes later
			}
			if data, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("data:")); ok {
				if data = bytes.TrimSpace(data); string(data) == "[DONE]" {
					done = true
				} else {
					note(call, data)
				}
			}
			line = line[:0]
		}
		if _, err := w.Write(chunk[:read]); err != nil {
			return done, err
		}
		if err := flush(); err != nil {
			return done, err
		}
		if broke != nil {
			return done, errBroken
		}
	}
}

// note takes the model and the usage from an answer, or from a chunk of one.
func note(call *keyturn.Call, answered []byte) {
	var said struct {
		Model string `json:"model"`
		Usage *struct {
			PromptTokens        *int64 `json:"prompt_tokens"`
			CompletionTokens    *int64 `json:"completion_tokens"`
			TotalTokens         *int64 `json:"total_tokens"`
			PromptTokensDetails struct {
				CachedTokens *int64 `json:"cached_tokens"`
			} `json:"prompt_tokens_details"`
		} `json:"usage"`
	}
	if json.Unmarshal(answered, &said) != nil {
		return
	}
	_ = call.Note(keyturn.Note{Model: said.Model})
	if said.Usage != nil {
		_ = call.Used(keyturn.Usage{
			InputTokens: said.Usage.PromptTokens, OutputTokens: said.Usage.CompletionTokens,
			CacheReadTokens: said.Usage.PromptTokensDetails.CachedTokens, TotalTokens: said.Usage.TotalTokens,
		})
	}
}

// refuseFor answers with why there is no decision.
func refuseFor(w http.ResponseWriter, err error) {
	if denied, ok := errors.AsType[*keyturn.DeniedError](err); ok {
		status, errorCode, message := http.StatusPaymentRequired, "denied", denied.Decision.Message
		if denial := denied.Decision.Denial; denial != nil {
			errorCode = strings.ToLower(denial.Reason.String())
			message = strings.TrimSpace(message + " " + denial.Suggestion)
			if denial.Retryable {
				status = http.StatusTooManyRequests
				w.Header().Set("Retry-After", strconv.Itoa(int(max(1, math.Ceil(denial.RetryAfter.Seconds())))))
			}
		}
		refuse(w, status, errorCode, message)
		return
	}
	fault, ok := errors.AsType[*keyturn.Error](err)
	switch {
	case errors.Is(err, keyturn.ErrUnavailable):
		w.Header().Set("Retry-After", "1")
		refuse(w, http.StatusServiceUnavailable, "sidecar_unavailable", "Nobody can be asked who pays: try again.")
	case errors.Is(err, keyturn.ErrNotFound):
		refuse(w, http.StatusUnauthorized, "unknown_user", "There is no such user.")
	case ok:
		refuse(w, http.StatusInternalServerError, strings.ToLower(cmp.Or(fault.Reason, "internal")), fault.Message)
	default: // the caller hung up, the gateway is being closed, or the user's id is no text
		refuse(w, http.StatusInternalServerError, "internal", "The request could not be taken.")
	}
}

// refuse answers with an error in OpenAI's form.
func refuse(w http.ResponseWriter, status int, errorCode, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{
		"error": map[string]string{"message": message, "type": "keyturn", "code": errorCode},
	})
}
